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

template <class Format>
FN void prepare_rows(Rows rows, const uint8_t* ahead, Prepared* prepared, uint32_t (*d)[LANES]) {
    constexpr int size = SUPERBLOCK / Format::block * Format::bytes;
    for (int r = 0; r < LANES; ++r) {
        for (int line = r * size / 64; line < (r + 1) * size / 64; ++line)
            __builtin_prefetch(ahead + 64 * line, 0, 2);
#pragma GCC unroll 4
        for (int b = 0; b < SUPERBLOCK / Format::part; ++b) d[b][r] = Format::d(rows[r], b);
        Format::prepare(rows[r], prepared[r]);
    }
}

template <class Format>
APART void unpack_rows(const Quantised&, Rows rows, const uint8_t* ahead, bool, Tile& tile) {
    constexpr int parts = SUPERBLOCK / Format::part;
    Prepared prepared[LANES];
    uint32_t d[parts][LANES];
    prepare_rows<Format>(rows, ahead, prepared, d);
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
    for (int b = 0; b < parts; ++b) tile.d[b] = half_to_float(load(d[b])) * Format::unit;
}

struct NVFP4 {
    static constexpr int id = 40, block = 64, bytes = 36, part = 16, largest = 24, zero = 12;
};

// Half of what a byte of four exponent and three mantissa bits stands for; 0x7F for 0.
FN F half_e4m3(U byte) {
    const U number = (U)(byte != 0x7f), normal = (U)((byte & 0x78) != 0);
    const U e = byte >> 3 & 15, m = (byte & 7) | (normal & 8);
    const F power = (F)((e + (~normal & 1) + 116) << 23);  // 2^(e - 11), of subnormals 2^-10
    return to_float((I)(m & number)) * power;
}

static void unpack_nvfp4(const Quantised&, Rows rows, const uint8_t* ahead, bool stream, Tile& tile) {
    const U table = table16(FP4_CODES), ones = scale_at(table16(ONE_CODES), 0);
    U words[36];
#pragma GCC unroll 9
    for (int i = 0; i < 9; ++i) gather16(rows, 16 * i, words + 4 * i);
    int line = 0;
#pragma GCC unroll 16
    for (int g = 0; g < 16; ++g) {
        const U *block = words + g / 4 * 9, *q = block + 1 + g % 4 * 2;
        tile.d[g] = half_e4m3(block[0] >> g % 4 * 8 & 255);
        tile.scale[g] = ones;
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
            U codes = look_up(table, q[j % 2] >> j / 2 * 4 & LOW4);
            if (stream)
                prefetch_line<NVFP4, true>(ahead, line, codes);
            else
                prefetch_line<NVFP4, false>(ahead, line, codes);
            tile.codes[4 * g + j] = codes;
            ++line;
        }
    }
    tile.blocks = 16;
}

// Steps of dot() that one part can take, of the four that a group of 16 values is.
constexpr int decoded_steps(int largest) { return run(largest) < 4 ? 1 : 4; }

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
                    settle<P>(part[t]);
#pragma GCC unroll 2
                    for (int p = 0; p < P; ++p)
                        sums[t][p] = scale_add(sums[t][p], part[t][p], w.scale[g]);
                }
            }
        }
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) {
            subtract_zero<P>(w, zero, *x[t], b, sums[t]);
            sum[t] = sum[t] + w.d[b] * join<P>(sums[t]);
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

template <class Format, int P>
void by_row(const Product& m, int row, int end, int t) {
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
        prepare_rows<Format>(rows, ahead_of(m, row, end, s, LANES * size), prepared, d);
        for (int r = 0; r < LANES; ++r) {
            add_row<Format, P>(rows[r], prepared[r], *x, sums, r);
            rows[r] += size;
        }
        F u = {};
#pragma GCC unroll 4
        for (int b = 0; b < parts; ++b) {
            I whole[P];
#pragma GCC unroll 2
            for (int p = 0; p < P; ++p) {
                whole[p] = added_across(sums[b][p]);
                int sum = 0;
                if (!Format::scaled)
#pragma GCC unroll 16
                    for (int g = 0; g < 16 / parts; ++g) sum += x->sum16[p][16 / parts * b + g];
                whole[p] -= Format::zero * sum;
            }
            u = u + half_to_float(load(d[b])) * Format::unit * join<P>(whole);
        }
        y = y + x->d * u;
    }
    store_tile(m, row, end, t, y);
}

}  // namespace isobit::ISOBIT_SIMD
