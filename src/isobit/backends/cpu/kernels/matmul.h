// Matrix products, docs/numerics.md section 4: LANES rows at a time, the integers exact in any order,
// the float steps in the written one. A lone token's codes are used as they are unpacked, if its
// format is fused; several tokens share a superblock unpacked to memory (tile.h, rows.h).
#pragma once

namespace isobit::ISOBIT_SIMD {

typedef void (*Multiply)(Tile&, int zero, const Activations* const*, int n, F* y);

// What a format's products are made of; `stream`: its weights are fetched as data that is used once.
struct Quantised {
    FormatInfo info;
    int zero;
    int group;  // values with one sub-scale
    bool mins;
    int part;  // values with one d
    // A superblock, or a row's short last one followed by zeros.
    void (*unpack)(const Quantised&, Rows, const uint8_t* ahead, bool stream, Tile&);
    Multiply multiply[2];
    // Columns of a tile of rows with one token; null if there is no more to win than by the others.
    void (*fused[2])(const Product&, bool stream, int row, int end, int t);
};

// A tile is rows [row, row + LANES) of the product, of which those below end are stored.
FN void tile_rows(const Product& m, int row, int end, const uint8_t** rows) {
    for (int r = 0; r < LANES; ++r)
        rows[r] = m.w + (size_t)(row + r < end ? row + r : end - 1) * m.row_bytes;
}

FN float* tile_of(const Product& m, int row, int t) {
    return m.y + (size_t)(m.y_rows ? m.y_rows[t] : t) * m.y_stride + row;
}

FN void store_tile(const Product& m, int row, int end, int t, const F& y) {
    float* out = tile_of(m, row, t);
    if (end - row >= LANES)
        memcpy(out, &y, sizeof y);
    else
        for (int r = 0; r < end - row; ++r) out[r] = y[r];
}

FN const Activations* inputs(const Product& m, int t) {
    return m.q + (size_t)(m.x_rows ? m.x_rows[t] : t) * blocks_of(m.columns);
}

// Rows lie one behind the other, so that a thread reads one stretch of memory from an item's first
// row to its last, then m.next. A tile's superblocks are taken across its rows, but prefetched along
// the stretch: the memory delivers a single sequential stream at full speed.
FN const uint8_t* ahead_of(const Product& m, int row, int end, int s, size_t step) {
    const size_t rest = (size_t)(end - row) * m.row_bytes;
    const size_t distance = (s * step) + LANES * m.row_bytes + PREFETCH_AHEAD;
    const uint8_t* here = m.w + (size_t)row * m.row_bytes;
    if (distance < rest) return here + distance;
    return m.next ? m.next + (distance - rest) : here;  // which is in the cache: costs no reading
}

// What is left of the rows, followed by zeros, whose blocks add nothing.
struct Padded {
    uint8_t bytes[LANES][SUPERBLOCK * 2];

    INLINE void fill(const uint8_t** rows, int left, int size) {
        for (int r = 0; r < LANES; ++r) {
            memcpy(bytes[r], rows[r], left);
            memset(bytes[r] + left, 0, size - left);
            rows[r] = bytes[r];
        }
    }
};

APART void several(const Quantised& f, const Product& m, Multiply multiply, bool stream, int row, int end,
                   int t0, int n) {
    const int size = SUPERBLOCK / f.info.block * f.info.bytes;
    const uint8_t* rows[LANES];
    tile_rows(m, row, end, rows);
    const Activations* x[TOKEN_BLOCK];
    F y[TOKEN_BLOCK];
    Tile tile;
    Padded last;
    for (int i = 0; i < n; ++i) x[i] = inputs(m, t0 + i), y[i] = F{};
    for (int s = 0; s < blocks_of(m.columns); ++s) {
        if ((s + 1) * SUPERBLOCK > m.columns) last.fill(rows, (int)m.row_bytes - s * size, size);
        f.unpack(f, rows, ahead_of(m, row, end, s, (size_t)LANES * size), stream, tile);
        multiply(tile, f.zero, x, n, y);
        for (int r = 0; r < LANES; ++r) rows[r] += size;
        for (int i = 0; i < n; ++i) ++x[i];
    }
    for (int i = 0; i < n; ++i) store_tile(m, row, end, t0 + i, y[i]);
}

// f(t, n) for so many tokens from t on.
template <class F>
FN void each_token_block(const Product& m, F&& f) {
    for (int t = 0; t < m.tokens; t += TOKEN_BLOCK)
        f(t, m.tokens - t < TOKEN_BLOCK ? m.tokens - t : TOKEN_BLOCK);
}

template <int P>
FN void token_block(const Quantised& f, const Product& m, bool stream, int begin, int end, int t, int n) {
    for (int row = begin; row < end; row += LANES)
        if (n == 1 && f.fused[P - 1])
            f.fused[P - 1](m, stream, row, end, t);
        else
            several(f, m, f.multiply[P - 1], stream, row, end, t, n);
}

template <int P, bool stream>
void matmul_quantised(const void* format, const Product& m, int begin, int end) {
    each_token_block(m, [&](int t, int n) __attribute__((always_inline)) {
        token_block<P>(*(const Quantised*)format, m, stream, begin, end, t, n);
    });
}

// One token.

template <class Format, int P>
FN void add_token(Rows rows, const uint8_t* ahead, bool stream, const Activations& x, F& y) {
    typedef ShapeOf<Format> S;
    constexpr int group = Format::group / 4;
    Scales w;
    Format::scales(rows, w);
    I sums[P] = {};
    typename S::Part part[64 / group][P];
    int n = 0;
    Format::codes(rows, [&](int j, U codes) __attribute__((always_inline)) {
        const int g = j / group;
        prefetch_line<Format>(ahead, n++, codes, stream);
#pragma GCC unroll 2
        for (int p = 0; p < P; ++p) {
            part[g][p] = dot(j % S::steps ? part[g][p] : typename S::Part{}, codes,
                             broadcast(x.plane[p] + 4 * j));
            if (j % S::steps == S::steps - 1)
                sums[p] = scale_add(sums[p], part[g][p], sub_scale<Format>(w, g));
        }
    });
    add_superblock<S, P>(w, Format::zero, sums, x, y);
}

template <class Format, int P>
FN void add_token_blocks(Rows rows, const uint8_t* ahead, bool stream, const Activations& x, F& y) {
    typedef ShapeOf<Format> S;
    constexpr int n = Format::block / 4;
    F sum = {};
    int line = 0;
    each_block<Format>(rows, [&](int b, Block<Format>& w) __attribute__((always_inline)) {
#pragma GCC unroll 64
        for (U& codes : w.codes) prefetch_line<Format>(ahead, line++, codes, stream);
        if constexpr (S::words) {
            I sum_of_words = {};
#pragma GCC unroll 8
            for (int j = 0; j < n; ++j)
                sum_of_words = dot_words(sum_of_words, w.codes[j], x.words + 4 * (n * b + j));
            sum = sum + block_value<P>(w.d, sum_of_words, x, b);
            return;
        }
        I sums[P] = {};
#pragma GCC unroll 8
        for (int j0 = 0; j0 < n; j0 += S::steps)
#pragma GCC unroll 2
            for (int p = 0; p < P; ++p) {
                typename S::Part part = {};
#pragma GCC unroll 32
                for (int j = j0; j < j0 + S::steps; ++j)
                    part = dot(part, w.codes[j], broadcast(x.plane[p] + 4 * (n * b + j)));
                sums[p] += total(part);
            }
        sum = sum + block_value<S, P>(w.d, w.dmin, Format::zero, sums, x, b);
    });
    y = y + x.d * sum;
}

template <class Format, int P>
void fused(const Product& m, bool stream, int row, int end, int t) {
    constexpr int size = superblock_bytes<Format>;
    const uint8_t* rows[LANES];
    tile_rows(m, row, end, rows);
    const Activations* x = inputs(m, t);
    F y = {};
    Padded last;
    for (int s = 0; s < blocks_of(m.columns); ++s, ++x) {
        const uint8_t* ahead = ahead_of(m, row, end, s, LANES * size);
        if constexpr (Format::block == SUPERBLOCK) {
            add_token<Format, P>(rows, ahead, stream, *x, y);
        } else {
            if ((s + 1) * SUPERBLOCK > m.columns) last.fill(rows, (int)m.row_bytes - s * size, size);
            add_token_blocks<Format, P>(rows, ahead, stream, *x, y);
        }
#pragma GCC unroll 16
        for (int r = 0; r < LANES; ++r) rows[r] += size;
    }
    store_tile(m, row, end, t, y);
}

}  // namespace isobit::ISOBIT_SIMD

#include "rows.h"

namespace isobit::ISOBIT_SIMD {

// The formats.

template <class Format>
constexpr Quantised quantised(const char* name) {
    typedef ShapeOf<Format> S;
    Quantised f = {{name, Format::id, Format::block, Format::bytes},
                   Format::zero,
                   Format::group,
                   Format::mins,
                   Format::block,
                   unpack<Format>,
                   {multiply<S, 1>, multiply<S, 2>},
                   {}};
    if constexpr (FUSES) f.fused[0] = fused<Format, 1>, f.fused[1] = fused<Format, 2>;
    return f;
}

template <class Format>
constexpr Quantised few_bits(const char* name) {
    constexpr int steps = decoded_steps(2 * Format::zero);
    return {{name, Format::id, Format::block, Format::bytes}, Format::zero, 16, false, Format::part,
            unpack_rows<Format>, {multiply_decoded<steps, 1>, multiply_decoded<steps, 2>},
            {by_row<Format, 1>, by_row<Format, 2>}};
}

constexpr Quantised nvfp4() {
    constexpr int steps = decoded_steps(NVFP4::largest);
    return {{"NVFP4", NVFP4::id, NVFP4::block, NVFP4::bytes}, NVFP4::zero, NVFP4::part, false,
            NVFP4::part, unpack_nvfp4,
            {multiply_decoded<steps, 1>, multiply_decoded<steps, 2>},
            {fused_nvfp4<1>, fused_nvfp4<2>}};
}

static constexpr Quantised quantised_formats[] = {
#define ISOBIT_FORMAT(Format) quantised<Format>(#Format),
    ISOBIT_QUANTISED(ISOBIT_FORMAT)
#undef ISOBIT_FORMAT
#define ISOBIT_FORMAT(Format) few_bits<Format>(#Format),
        ISOBIT_FEW_BITS(ISOBIT_FORMAT) nvfp4(),
#undef ISOBIT_FORMAT
};

FN constexpr const Quantised* quantised_format(int ggml_type) {
    for (const Quantised& f : quantised_formats)
        if (f.info.type == ggml_type) return &f;
    return nullptr;
}

template <bool stream>
static Matmul matmul(int ggml_type, int planes) {
    switch (ggml_type) {
        case 0: return {matmul_float<AsF32>, nullptr};
        case 1: return {matmul_float<AsF16>, nullptr};
        case 30: return {matmul_float<AsBF16>, nullptr};
    }
    const Quantised* f = quantised_format(ggml_type);
    if (!f) return {nullptr, nullptr};
    return {planes == 2 ? matmul_quantised<2, stream> : matmul_quantised<1, stream>, f};
}

}  // namespace isobit::ISOBIT_SIMD
