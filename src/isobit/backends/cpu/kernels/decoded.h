// The formats of decode.h in a tile: each row decoded to bytes, then as any other. And NVFP4, which has
// as many scales.
#pragma once

namespace isobit::ISOBIT_SIMD {

static void unpack_decoded(const Quantised& f, Rows rows, const uint8_t* ahead, bool, Tile& tile) {
    Decoded decoded[LANES];
    const uint8_t* at[LANES];
    const int size = SUPERBLOCK / f.info.block * f.info.bytes;
    for (int r = 0; r < LANES; ++r) {
        f.decoded->decode(rows[r], decoded[r]);
        at[r] = (const uint8_t*)&decoded[r];
        for (int line = r * size / 64; line < (r + 1) * size / 64; ++line)
            __builtin_prefetch(ahead + 64 * line, 0, 2);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) gather16(at, 16 * i, tile.codes + 4 * i);
    gather16(at, offsetof(Decoded, scales), tile.w.scales);
#pragma GCC unroll 16
    for (int g = 0; g < 16; ++g) tile.scale[g] = signed_scale_at(tile.w.scales[g / 4], g % 4);
    tile.blocks = SUPERBLOCK / f.decoded->part;
    for (int b = 0; b < tile.blocks; b += 4) gather16(at, offsetof(Decoded, d) + 4 * b, (U*)tile.d + b);
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

}  // namespace isobit::ISOBIT_SIMD
