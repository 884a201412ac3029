// Products with formats of few_bits.h, row by row for a lone token: codes are multiplied as bytes, and the
// lanes' sums of LANES rows are added across at a superblock's end. Several tokens share a tile of them.
// And NVFP4, which has a scale for each 16 values as some of these have one for each part.
#pragma once

namespace isobit::ISOBIT_SIMD {

typedef int16_t Sixteen __attribute__((vector_size(32)));

struct alignas(32) RowCodes {
    uint8_t codes[SUPERBLOCK];
    int8_t scales[16];
};

FN const uint8_t* prefetch_until(const uint8_t* line, const uint8_t* end, bool stream) {
#pragma GCC unroll 1
    for (; line < end; line += 64)
        if (stream)
            __builtin_prefetch(line, 0, 0);
        else
            __builtin_prefetch(line, 0, 2);
    return line;
}

template <class Format>
FN void prepare_rows(Rows rows, const uint8_t* ahead, bool stream, Prepared* prepared, uint32_t (*d)[LANES]) {
    constexpr int size = SUPERBLOCK / Format::block * Format::bytes;
    const uint8_t* line = ahead;
    for (int r = 0; r < LANES; ++r) {
        line = prefetch_until(line, ahead + (r + 1) * size, stream);
#pragma GCC unroll 4
        for (int b = 0; b < SUPERBLOCK / Format::part; ++b) d[b][r] = Format::d(rows[r], b);
        Format::prepare(rows[r], prepared[r]);
    }
}

template <class Format>
APART void unpack_rows(const Quantised&, Rows rows, const uint8_t* ahead, bool stream, Tile& tile) {
    constexpr int parts = SUPERBLOCK / Format::part;
    Prepared prepared[LANES];
    uint32_t d[parts][LANES];
    prepare_rows<Format>(rows, ahead, stream, prepared, d);
    RowCodes unpacked[LANES];
    const uint8_t* at[LANES];
    for (int r = 0; r < LANES; ++r) {
        RowCodes& to = unpacked[r];
        auto put = [&](int c, U codes) __attribute__((always_inline)) {
            memcpy(to.codes + BYTES * c, &codes, BYTES);
        };
        Format::codes(rows[r], prepared[r], put);
        for (int g = 0; g < 16; ++g)
            to.scales[g] = Format::scaled ? (int8_t)prepared[r].scales[g] : 1;
        at[r] = (const uint8_t*)&to;
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) gather16(at, 16 * i, tile.codes + 4 * i);
    gather16(at, offsetof(RowCodes, scales), tile.w.scales);
#pragma GCC unroll 16
    for (int g = 0; g < 16; ++g) tile.scale[g] = signed_scale_at(tile.w.scales[g / 4], g % 4);
    tile.blocks = parts;
    for (int b = 0; b < parts; ++b) tile.d[b] = half_to_float(load(d[b])) * Format::d_unit;
}

struct NVFP4 {
    static constexpr int id = 40, block = 64, bytes = 36, part = 16, largest = 24, zero = 12;
};

// Half of what a byte of four exponent and three mantissa bits stands for, without its sign; 0x7F alone
// for 0. A binary16 with the same bits has a larger bias.
FN F half_e4m3(U byte) {
    const U number = (U)(byte != 0x7f);
    return half_to_float((byte & 0x7f & number) << 7) * 128.0f;
}

// f(g, d, codes) for each 16 values, whose codes are four vectors.
template <class Use>
FN void each_nvfp4(Rows rows, const uint8_t* ahead, bool stream, Use&& f) {
    const U table = table16(FP4_CODES);
    const uint8_t* line = ahead;
#pragma GCC unroll 1
    for (int i = 0; i < 4; ++i) {
        U words[12];  // the last three begin again in the middle
        gather16(rows, 36 * i, words);
        gather16(rows, 36 * i + 16, words + 4);
        gather16(rows, 36 * i + 20, words + 8);
        line = prefetch_until(line, ahead + (i + 1) * LANES * NVFP4::bytes, stream);
#pragma GCC unroll 4
        for (int g = 0; g < 4; ++g) {
            const U q[2] = {words[g < 3 ? 1 + 2 * g : 10], words[g < 3 ? 2 + 2 * g : 11]};
            U codes[4];
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j) codes[j] = look_up(table, q[j % 2] >> j / 2 * 4 & LOW4);
            f(4 * i + g, half_e4m3(words[0] >> 8 * g & 255), codes);
        }
    }
}

static void unpack_nvfp4(const Quantised&, Rows rows, const uint8_t* ahead, bool stream, Tile& tile) {
    const U ones = scale_at(table16(ONE_CODES), 0);
    auto put = [&](int g, const F& d, const U* codes) __attribute__((always_inline)) {
        tile.d[g] = d;
        tile.scale[g] = ones;
        memcpy(tile.codes + 4 * g, codes, sizeof(U[4]));
    };
    each_nvfp4(rows, ahead, stream, put);
    tile.blocks = 16;
}

// One token; sums so small are themselves as floats, and so are joined as integers as well.
template <int P>
void fused_nvfp4(const Product& m, bool stream, int row, int end, int t) {
    constexpr int size = 4 * NVFP4::bytes;
    const uint8_t* rows[LANES];
    tile_rows(m, row, end, rows);
    const Activations* x = inputs(m, t);
    F y = {};
    Padded last;
    for (int s = 0; s < blocks_of(m.columns); ++s, ++x) {
        if ((s + 1) * SUPERBLOCK > m.columns) last.fill(rows, (int)m.row_bytes - s * size, size);
        F u = {};
        auto add = [&](int g, const F& d, const U* codes) __attribute__((always_inline)) {
            Part part[P];
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j)
#pragma GCC unroll 2
                for (int p = 0; p < P; ++p)
                    part[p] = dot(j ? part[p] : Part{}, codes[j],
                                  broadcast(x->plane[p] + 16 * g + 4 * j));
            int zero = x->sum16[0][g];
            I sum = total(part[0]);
            if constexpr (P == 2) {
                zero = zero * 256 + x->sum16[1][g];
                sum = (sum << 8) + total(part[1]);
            }
            u = u + d * to_float(sum - NVFP4::zero * zero);
        };
        each_nvfp4(rows, ahead_of(m, row, end, s, LANES * size), stream, add);
        y = y + x->d * u;
#pragma GCC unroll 16
        for (int r = 0; r < LANES; ++r) rows[r] += size;
    }
    store_tile(m, row, end, t, y);
}

// Steps of dot() that one part can take, of the four that a group of 16 values is.
constexpr int decoded_steps(int largest) { return max_unspilled_sums(largest) < 4 ? 1 : 4; }

// Sub-scales times the sums of each group's activations in one plane, of block b.
template <int P>
FN void subtract_zero(const Tile& w, int zero, const Activations& x, int b, I* sums) {
    const int groups = 16 / w.blocks;
#pragma GCC unroll 2
    for (int p = 0; p < P; ++p) {
        if (w.blocks == 1) {
            sums[p] -= zero * dot_sums<16, true>(w.w.scales, x, p);
        } else {  // whose sub-scales are 1
            int sum = 0;
            for (int g = groups * b; g < groups * (b + 1); ++g) sum += x.sum16[p][g];
            sums[p] -= zero * sum;
        }
    }
}

template <int steps, int P, int T>
FN void add_decoded(const Tile& w, int zero, const Activations* const* x, F* y) {
    const int groups = 16 / w.blocks;
    F sum[T] = {};
    for (int b = 0; b < w.blocks; ++b) {
        I sums[T][P] = {};
        for (int g = groups * b; g < groups * (b + 1); ++g) {
            if constexpr (steps == 1) {
#pragma GCC unroll 4
                for (int j = 4 * g; j < 4 * g + 4; ++j)
#pragma GCC unroll 4
                    for (int t = 0; t < T; ++t)
#pragma GCC unroll 2
                        for (int p = 0; p < P; ++p)
                            sums[t][p] = scale_add(
                                sums[t][p], dot(Part{}, w.codes[j], broadcast(x[t]->plane[p] + 4 * j)),
                                w.scale[g]);
            } else {
                Part part[T][P] = {};
#pragma GCC unroll 2
                for (int j = 4 * g; j < 4 * g + 4; j += 2)
                    dot_pair<P, T>(part, w.codes + j, x, 4 * j);
#pragma GCC unroll 4
                for (int t = 0; t < T; ++t) {
                    reduce_lanes<P>(part[t]);
#pragma GCC unroll 2
                    for (int p = 0; p < P; ++p)
                        sums[t][p] = scale_add(sums[t][p], part[t][p], w.scale[g]);
                }
            }
        }
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) {
            subtract_zero<P>(w, zero, *x[t], b, sums[t]);
            sum[t] = sum[t] + w.d[b] * combine_planes<P>(sums[t]);
        }
    }
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) y[t] = y[t] + x[t]->d * sum[t];
}

template <int steps, int P>
APART void multiply_decoded(Tile& w, int zero, const Activations* const* x, int n, F* y) {
#pragma GCC unroll 32
    for (int j = 0; j < 64; j += 2) make_pair<P>(w.codes + j);
    int i = 0;
    for (; i + 4 <= n; i += 4) add_decoded<steps, P, 4>(w, zero, x + i, y + i);
    for (; i < n; ++i) add_decoded<steps, P, 1>(w, zero, x + i, y + i);
}

// One token. The sums of a row are in all lanes of a vector until they are added across.
template <class Format, int P>
FN void add_row(const uint8_t* row, const Prepared& prepared, const Activations& x,
                I (*sums)[P][LANES], int r) {
    constexpr int parts = SUPERBLOCK / Format::part, each = VECTORS / parts;
    if constexpr (Format::scaled) {
        I sum[P];
        Sixteen scales;
        alignas(32) int16_t zeros[16];
        fetch(scales, prepared.scales);
        leave(zeros, scales * (int16_t)-Format::zero);
#pragma GCC unroll 2
        for (int p = 0; p < P; ++p) sum[p] = dot_sixteen(zeros, x.sum16[p]);
        auto put = [&](int c, U codes) __attribute__((always_inline)) {
            const U scale = spread_scales(prepared.scales, c);
#pragma GCC unroll 2
            for (int p = 0; p < P; ++p)
                sum[p] = scaled_dot(sum[p], codes, load(x.plane[p] + BYTES * c), scale);
        };
        Format::codes(row, prepared, put);
#pragma GCC unroll 2
        for (int p = 0; p < P; ++p) sums[0][p][r] = sum[p];
    } else {
        Part part[P];
        auto put = [&](int c, U codes) __attribute__((always_inline)) {
#pragma GCC unroll 2
            for (int p = 0; p < P; ++p) {
                part[p] = dot(c % each ? part[p] : Part{}, codes, load(x.plane[p] + BYTES * c));
                if (c % each == each - 1) sums[c / each][p][r] = total(part[p]);
            }
        };
        Format::codes(row, prepared, put);
    }
}

// T of part b. Sums below 2^24 are themselves as floats, and so are joined as integers as well.
template <class Format, int P>
FN F part_sums(I (*sums)[LANES], const Activations& x, int b) {
    I whole[P];
    if constexpr (Format::scaled) {
#pragma GCC unroll 2
        for (int p = 0; p < P; ++p) whole[p] = added_across(sums[p]);
        return combine_planes<P>(whole);
    }
    constexpr int groups = Format::part / 16;
    alignas(32) int16_t zero[2][16] = {};
    for (int g = groups * b; g < groups * (b + 1); ++g)
        zero[P - 1][g] = Format::zero, zero[0][g] = (P == 2 ? 256 : 1) * Format::zero;
    I zeros = dot_sixteen(zero[0], x.sum16[0]);
    if (P == 2) zeros += dot_sixteen(zero[1], x.sum16[1]);
#pragma GCC unroll 16
    for (int r = 0; r < LANES; ++r)
        sums[0][r] = (P == 2 ? (sums[0][r] << 8) + sums[P - 1][r] : sums[0][r]) - zeros;
    return to_float(added_across(sums[0]));
}

template <class Format, int P>
void by_row(const Product& m, bool stream, int row, int end, int t) {
    constexpr int size = SUPERBLOCK / Format::block * Format::bytes,
                  parts = SUPERBLOCK / Format::part;
    const uint8_t* rows[LANES];
    tile_rows(m, row, end, rows);
    const Activations* x = inputs(m, t);
    F y = {};
    Padded last;
    for (int s = 0; s < blocks_of(m.columns); ++s, ++x) {
        if (Format::block < SUPERBLOCK && (s + 1) * SUPERBLOCK > m.columns)
            last.fill(rows, (int)m.row_bytes - s * size, size);
        I sums[parts][P][LANES];
        uint32_t d[parts][LANES];
        Prepared prepared[LANES];
        prepare_rows<Format>(rows, ahead_of(m, row, end, s, LANES * size), stream, prepared, d);
        for (int r = 0; r < LANES; ++r) {
            add_row<Format, P>(rows[r], prepared[r], *x, sums, r);
            rows[r] += size;
        }
        F u = {};
#pragma GCC unroll 4
        for (int b = 0; b < parts; ++b) {
            u = u + half_to_float(load(d[b])) * Format::d_unit * part_sums<Format, P>(sums[b], *x, b);
        }
        y = y + x->d * u;
    }
    store_tile(m, row, end, t, y);
}

}  // namespace isobit::ISOBIT_SIMD
