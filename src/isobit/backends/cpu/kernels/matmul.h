// Matrix products, docs/numerics.md section 4: LANES rows at a time, the integers exact in any order,
// the float steps in the written one. A lone token's codes are used as they are unpacked; several
// tokens share a superblock unpacked to memory.
#pragma once

namespace isobit::ISOBIT_SIMD {

constexpr int TOKEN_BLOCK = 64;
constexpr size_t PREFETCH_AHEAD = 8192;  // bytes, beyond the next tile

FN F to_float(I v) { return __builtin_convertvector(v, F); }

// T = f(H) * 256 + f(L), or f(S).
template <int P>
FN F join(const I* sums) {
    if constexpr (P == 1) return to_float(sums[0]);
    return to_float(sums[0]) * 256.0f + to_float(sums[1]);
}

// The sub-scale of group g, for scale_add.
template <class Format>
FN U sub_scale(const Scales& w, int g) {
    return Format::signed_scales ? signed_scale_at(w.scales[g / 4], g % 4) : scale_at(w.scales[g / 4], g % 4);
}

// Sub-scales or mins times the sums of each group's activations in one plane.
template <class Format, bool is_signed>
FN I dot_sums(const U* bytes, const Activations& x, int plane) {
    constexpr int n = 128 / Format::group;
    const int16_t* sums = Format::group == 16 ? x.sum16[plane] : x.sum32[plane];
    I sum = {};
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i) {
        const int b = i % 2 * 2;
        U pair = is_signed ? signed_byte_pairs(bytes[i / 2], b, b + 1)
                           : byte_pairs(bytes[i / 2], b, b + 1);
        sum += madd(pair, broadcast(sums + 2 * i));
    }
    return sum;
}

// Codes for which dot() would not be exact over two steps have parts of another type.
template <bool wide>
struct PartType {
    typedef Part type;
};
template <>
struct PartType<true> {
    typedef WidePart type;
};
template <class Format>
constexpr bool wide = run(Format::largest) < 2;
template <class Format>
using PartOf = typename PartType<wide<Format>>::type;

// Steps of dot() that one part can take: as far as it is exact, and within one group.
template <class Format>
constexpr int part_steps() {
    constexpr int group = Format::group / 4, limit = wide<Format> ? WIDE_RUN : run(Format::largest);
    int steps = limit < group ? limit : group;
    while (group % steps) --steps;
    return steps;
}

// y += d_x * (d * T - dmin * M), of one superblock's sums over scaled codes.
template <class Format, int P>
FN void add_superblock(const Scales& w, I* sums, const Activations& x, F& y) {
    if constexpr (Format::zero != 0)
#pragma GCC unroll 2
        for (int p = 0; p < P; ++p)
            sums[p] -= Format::zero * dot_sums<Format, Format::signed_scales>(w.scales, x, p);
    F u = w.d * join<P>(sums);
    if constexpr (Format::mins) {
        I m = dot_sums<Format, false>(w.mins, x, 0);
        if constexpr (P == 2) m = (m << 8) + dot_sums<Format, false>(w.mins, x, 1);
        u = u - w.dmin * to_float(m);
    }
    y = y + x.d * u;
}

// What will be read later, a line of memory with each vector of codes. A core drops a prefetch when
// it has as many lines under way as it can have; so each line is asked for twice.
template <class Format>
constexpr int superblock_bytes = SUPERBLOCK / Format::block * Format::bytes;

template <class Format>
FN void prefetch_line(const uint8_t* ahead, int i, U& codes) {
    constexpr int lines = (LANES * superblock_bytes<Format> + 63) / 64, again = 16;
    if (i < lines) prefetch(ahead + 64 * i, codes);
    if (i >= again && i < again + lines) prefetch(ahead + 64 * (i - again), codes);
}

template <class Format, int P>
FN void add_token(Rows rows, const uint8_t* ahead, const Activations& x, F& y) {
    constexpr int group = Format::group / 4, steps = part_steps<Format>();
    Scales w;
    Format::scales(rows, w);
    I sums[P] = {};
    PartOf<Format> part[64 / group][P];
    int n = 0;
    Format::codes(rows, [&](int j, U codes) __attribute__((always_inline)) {
        const int g = j / group;
        prefetch_line<Format>(ahead, n++, codes);
#pragma GCC unroll 2
        for (int p = 0; p < P; ++p) {
            part[g][p] = dot(j % steps ? part[g][p] : PartOf<Format>{}, codes,
                             broadcast(x.plane[p] + 4 * j));
            if (j % steps == steps - 1)
                sums[p] = scale_add(sums[p], part[g][p], sub_scale<Format>(w, g));
        }
    });
    add_superblock<Format, P>(w, sums, x, y);
}

#ifndef ISOBIT_PAIRS
// Two vectors of codes made ready for dot_pair(), which multiplies both with T tokens' activations in
// P planes. settle() ends a token's parts: then part[p] is plane p's.
template <int P>
FN void make_pair(U*) {}

template <int P, int T, class Part>
FN void dot_pair(Part (*part)[P], const U* codes, const Activations* const* x, int at) {
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j)
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t)
#pragma GCC unroll 2
            for (int p = 0; p < P; ++p)
                part[t][p] = dot(part[t][p], codes[j], broadcast(x[t]->plane[p] + at + 4 * j));
}

template <int P, class Part>
FN void settle(Part*) {}
#endif

template <class Format, int P, int T>
FN void add_tokens(const U* codes, const U* scale, const Scales& w, const Activations* const* x, F* y) {
    constexpr int group = Format::group / 4, steps = part_steps<Format>();
    static_assert(steps % 2 == 0);
    I sums[T][P] = {};
    for (int j0 = 0; j0 < 64; j0 += steps) {
        PartOf<Format> part[T][P] = {};
#pragma GCC unroll 4
        for (int j = j0; j < j0 + steps; j += 2) dot_pair<P, T>(part, codes + j, x, 4 * j);
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) {
            settle<P>(part[t]);
#pragma GCC unroll 2
            for (int p = 0; p < P; ++p)
                sums[t][p] = scale_add(sums[t][p], part[t][p], scale[j0 / group]);
        }
    }
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) add_superblock<Format, P>(w, sums[t], *x[t], y[t]);
}

template <class Format, int P>
FN void add_superblocks(Rows rows, const uint8_t* ahead, const Activations* const* x, int n, F* y) {
    Scales w;
    Format::scales(rows, w);
    U scale[64 / (Format::group / 4)], tile[64];
#pragma GCC unroll 16
    for (int g = 0; g < 64 / (Format::group / 4); ++g) scale[g] = sub_scale<Format>(w, g);
    int lines = 0;
    Format::codes(rows, [&](int j, U codes) __attribute__((always_inline)) {
        prefetch_line<Format>(ahead, lines++, codes);
        tile[j] = codes;
    });
#pragma GCC unroll 32
    for (int j = 0; j < 64; j += 2) make_pair<P>(tile + j);
    int i = 0;
    for (; i + 4 <= n; i += 4) add_tokens<Format, P, 4>(tile, scale, w, x + i, y + i);
    for (; i + 2 <= n; i += 2) add_tokens<Format, P, 2>(tile, scale, w, x + i, y + i);
    if (i < n) add_tokens<Format, P, 1>(tile, scale, w, x + i, y + i);
}

// Formats of smaller blocks.

// The sum of the activations that block b of the superblock multiplies, in one plane.
template <class Format>
FN int block_sum(const Activations& x, int plane, int b) {
    constexpr int n = Format::block / 32;
    int sum = 0;
    for (int i = 0; i < n; ++i) sum += x.sum32[plane][n * b + i];
    return sum;
}

// u of block b, of its sums over codes.
template <class Format, int P>
FN F block_value(F d, F dmin, I* sums, const Activations& x, int b) {
    if constexpr (Format::zero != 0)
#pragma GCC unroll 2
        for (int p = 0; p < P; ++p) sums[p] -= Format::zero * block_sum<Format>(x, p, b);
    F u = d * join<P>(sums);
    if constexpr (Format::mins) {
        int m = block_sum<Format>(x, 0, b);
        if constexpr (P == 2) m = m * 256 + block_sum<Format>(x, 1, b);
        u = u - dmin * (float)m;
    }
    return u;
}

// u of a block of codes, with one token.
template <class Format, int P>
FN F block_times(const Block<Format>& w, const Activations& x, int b) {
    constexpr int n = Format::block / 4, steps = part_steps<Format>();
    I sums[P] = {};
#pragma GCC unroll 8
    for (int j0 = 0; j0 < n; j0 += steps)
#pragma GCC unroll 2
        for (int p = 0; p < P; ++p) {
            PartOf<Format> part = {};
#pragma GCC unroll 32
            for (int j = j0; j < j0 + steps; ++j)
                part = dot(part, w.codes[j], broadcast(x.plane[p] + 4 * (n * b + j)));
            sums[p] += total(part);
        }
    return block_value<Format, P>(w.d, w.dmin, sums, x, b);
}

// The rows' superblocks by 16 bytes, each block unpacked as soon as all of it is there: f(b, block).
template <class Format, class Use>
FN void each_block(Rows rows, Use&& f) {
    constexpr int bytes = superblock_bytes<Format>, blocks = SUPERBLOCK / Format::block;
    U words[(bytes + 15) / 16 * 4];
    int have = 0;
#pragma GCC unroll 8
    for (int b = 0; b < blocks; ++b) {
#pragma GCC unroll 4
        for (; have < Format::bytes * (b + 1); have += 16) {
            if (have + 16 <= bytes) {
                gather16(rows, have, words + have / 4);
            } else {  // what is left, without a byte behind it
                U last[4];
                gather16(rows, bytes - 16, last);
#pragma GCC unroll 4
                for (int j = 0; j < (bytes - have) / 4; ++j)
                    words[have / 4 + j] = last[4 - (bytes - have) / 4 + j];
            }
        }
        Block<Format> w;
        Format::unpack(InWords{words, b * Format::bytes}, w);
        f(b, w);
    }
}

template <class Format, int P>
FN void add_token_blocks(Rows rows, const uint8_t* ahead, const Activations& x, F& y) {
    F sum = {};
    int n = 0;
    each_block<Format>(rows, [&](int b, Block<Format>& w) __attribute__((always_inline)) {
#pragma GCC unroll 64
        for (U& codes : w.codes) prefetch_line<Format>(ahead, n++, codes);
        sum = sum + block_times<Format, P>(w, x, b);
    });
    y = y + x.d * sum;
}

template <class Format, int P, int T>
FN void add_tokens_blocks(const U* codes, const F* d, const F* dmin, const Activations* const* x,
                          F* y) {
    constexpr int n = Format::block / 4, steps = part_steps<Format>();
    static_assert(steps % 2 == 0);
    F sum[T] = {};
    for (int b = 0; b < SUPERBLOCK / Format::block; ++b) {
        I sums[T][P] = {};
#pragma GCC unroll 4
        for (int j0 = n * b; j0 < n * (b + 1); j0 += steps) {
            PartOf<Format> part[T][P] = {};
#pragma GCC unroll 4
            for (int j = j0; j < j0 + steps; j += 2) dot_pair<P, T>(part, codes + j, x, 4 * j);
#pragma GCC unroll 4
            for (int t = 0; t < T; ++t) {
                settle<P>(part[t]);
#pragma GCC unroll 2
                for (int p = 0; p < P; ++p) sums[t][p] += total(part[t][p]);
            }
        }
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t)
            sum[t] = sum[t] + block_value<Format, P>(d[b], dmin[b], sums[t], *x[t], b);
    }
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) y[t] = y[t] + x[t]->d * sum[t];
}

template <class Format, int P>
FN void add_superblocks_of_blocks(Rows rows, const uint8_t* ahead, const Activations* const* x,
                                  int n, F* y) {
    constexpr int size = Format::block / 4;
    U codes[64];
    F d[SUPERBLOCK / Format::block], dmin[SUPERBLOCK / Format::block];
    int lines = 0;
    each_block<Format>(rows, [&](int b, Block<Format>& w) __attribute__((always_inline)) {
        d[b] = w.d, dmin[b] = Format::mins ? w.dmin : F{};
#pragma GCC unroll 32
        for (int j = 0; j < size; ++j) {
            prefetch_line<Format>(ahead, lines++, w.codes[j]);
            codes[size * b + j] = w.codes[j];
        }
    });
#pragma GCC unroll 32
    for (int j = 0; j < 64; j += 2) make_pair<P>(codes + j);
    int i = 0;
    for (; i + 4 <= n; i += 4) add_tokens_blocks<Format, P, 4>(codes, d, dmin, x + i, y + i);
    for (; i + 2 <= n; i += 2) add_tokens_blocks<Format, P, 2>(codes, d, dmin, x + i, y + i);
    if (i < n) add_tokens_blocks<Format, P, 1>(codes, d, dmin, x + i, y + i);
}

// The n blocks of a row's short last superblock.
template <class Format, int P>
FN void add_last_blocks(const uint8_t** rows, int n, const Activations* const* x, int tokens, F* y) {
    F sum[TOKEN_BLOCK];
    for (int t = 0; t < tokens; ++t) sum[t] = F{};
    for (int b = 0; b < n; ++b) {
        Block<Format> w;
        Format::unpack(InRows{rows}, w);
#pragma GCC unroll 16
        for (int r = 0; r < LANES; ++r) rows[r] += Format::bytes;
        for (int t = 0; t < tokens; ++t) sum[t] = sum[t] + block_times<Format, P>(w, *x[t], b);
    }
    for (int t = 0; t < tokens; ++t) y[t] = y[t] + x[t]->d * sum[t];
}

// A tile is rows [row, row + LANES) of the product, of which those below end are stored.
FN void tile_rows(const Product& m, int row, int end, const uint8_t** rows) {
    for (int r = 0; r < LANES; ++r)
        rows[r] = m.w + (size_t)(row + r < end ? row + r : end - 1) * m.row_bytes;
}

FN void store_tile(const Product& m, int row, int end, int t, const F& y) {
    float* out = m.y + (size_t)(m.y_rows ? m.y_rows[t] : t) * m.y_stride + row;
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

// One superblock of a tile, or what a row has left of one; the rows move on behind it.
template <class Format, int P, bool one>
FN void add_columns(const uint8_t** rows, const uint8_t* ahead, int left, const Activations* const* x,
                    int n, F* y) {
    if constexpr (Format::block != SUPERBLOCK)
        if (left < SUPERBLOCK)
            return add_last_blocks<Format, P>(rows, left / Format::block, x, n, y);
    if constexpr (Format::block == SUPERBLOCK && one)
        add_token<Format, P>(rows, ahead, *x[0], y[0]);
    else if constexpr (Format::block == SUPERBLOCK)
        add_superblocks<Format, P>(rows, ahead, x, n, y);
    else if constexpr (one)
        add_token_blocks<Format, P>(rows, ahead, *x[0], y[0]);
    else
        add_superblocks_of_blocks<Format, P>(rows, ahead, x, n, y);
#pragma GCC unroll 16
    for (int r = 0; r < LANES; ++r) rows[r] += superblock_bytes<Format>;
}

template <class Format, int P, int most>
void tile_of(const Product& m, int row, int end, int t0, int tokens) {
    const int n = most == 1 ? 1 : tokens;
    const uint8_t* rows[LANES];
    tile_rows(m, row, end, rows);
    const Activations* x[most];
    F y[most];
    for (int i = 0; i < n; ++i) x[i] = inputs(m, t0 + i), y[i] = F{};
    for (int s = 0; s < blocks_of(m.columns); ++s) {
        const uint8_t* ahead = ahead_of(m, row, end, s, LANES * superblock_bytes<Format>);
        add_columns<Format, P, most == 1>(rows, ahead, m.columns - SUPERBLOCK * s, x, n, y);
        for (int i = 0; i < n; ++i) ++x[i];
    }
    for (int i = 0; i < n; ++i) store_tile(m, row, end, t0 + i, y[i]);
}

template <class Format, int P>
void matmul_quantised(const Product& m, int begin, int end) {
    for (int t = 0; t < m.tokens; t += TOKEN_BLOCK) {
        int n = m.tokens - t < TOKEN_BLOCK ? m.tokens - t : TOKEN_BLOCK;
        for (int row = begin; row < end; row += LANES)
            if (n == 1)
                tile_of<Format, P, 1>(m, row, end, t, 1);
            else
                tile_of<Format, P, TOKEN_BLOCK>(m, row, end, t, n);
    }
}

// Float weights: y = sum256(W_k * x_k), W converted exactly.

struct AsF32 {
    static constexpr int bytes = 4;
    FN float value(const uint8_t* p) {
        float x;
        memcpy(&x, p, 4);
        return x;
    }
};
struct AsBF16 {
    static constexpr int bytes = 2;
    FN float value(const uint8_t* p) {
        uint16_t x;
        memcpy(&x, p, 2);
        return from_bits((uint32_t)x << 16);
    }
};
struct AsF16 {
    static constexpr int bytes = 2;
    FN float value(const uint8_t* p) {
        uint16_t x;
        memcpy(&x, p, 2);
        uint32_t sign = (uint32_t)(x & 0x8000) << 16, rest = x & 0x7fff;
        // As a binary32 the exponent is 112 too small; multiplying is exact and mends subnormals.
        float y = from_bits(rest << 13) * from_bits(0x77800000u);
        uint32_t special = rest >= 0x7c00 ? 0x7f800000u : 0;
        return from_bits(bits(y) | special | sign);
    }
};

template <class Format>
void matmul_float(const Product& m, int begin, int end) {
    for (int row = begin; row < end; ++row) {
        const uint8_t* w = m.w + (size_t)row * m.row_bytes;
        for (int t = 0; t < m.tokens; ++t) {
            const float* x = m.x + (size_t)(m.x_rows ? m.x_rows[t] : t) * m.columns;
            Lanes256 lanes;
            int k = 0;
            for (; k + 256 <= m.columns; k += 256) {
                const uint8_t* block = w + (size_t)k * Format::bytes;
                for (int i = 0; i < 256 * Format::bytes; i += 64)
                    __builtin_prefetch(block + PREFETCH_AHEAD + i);
                for (int i = 0; i < 256; ++i)
                    lanes.v[i] += Format::value(block + i * Format::bytes) * x[k + i];
            }
            for (int i = 0; k + i < m.columns; ++i)
                lanes.v[i] += Format::value(w + (size_t)(k + i) * Format::bytes) * x[k + i];
            m.y[(m.y_rows ? m.y_rows[t] : t) * m.y_stride + row] = lanes.sum();
        }
    }
}

template <int P>
Matmul matmul_of(int ggml_type) {
    switch (ggml_type) {
        case 0: return matmul_float<AsF32>;
        case 1: return matmul_float<AsF16>;
        case 30: return matmul_float<AsBF16>;
#define ISOBIT_CASE(Format) \
    case Format::id: return matmul_quantised<Format, P>;
        ISOBIT_QUANTISED(ISOBIT_CASE)
#undef ISOBIT_CASE
    }
    return nullptr;
}

static Matmul matmul(int ggml_type, int planes) {
    return planes == 2 ? matmul_of<2>(ggml_type) : matmul_of<1>(ggml_type);
}

}  // namespace isobit::ISOBIT_SIMD
