// Sixteen rows of a tiled weight times N times eight columns of activations, one superblock deep, by one
// warp on int8 tensor cores (docs/numerics.md, section 4). In the product's terms the weights are A: a line
// of a tile (tiles.cuh) holds one register of the fragment for each lane, rows 0-7 from one tile and
// rows 8-15 from another. With g = lane / 4 and t = lane % 4 the lane gets u of row g of the first
// tile and then of the second, each for columns 2t and 2t+1.
#pragma once
#include "mma.cuh"
#include "tiles.cuh"

// Where a lane finds its part of eight activations of one superblock.
struct Columns {
    SharedAddress rows;  // for load_matrices: both halves of 32 values, of both planes
    const int* digits;   // of column g, groups 4 (t % 2) …

    Columns() = default;
    // Missing columns repeat the last of `count`.
    DEV Columns(const ColumnActivations* x, int count) {
        int lane = lane_id();
        const ColumnActivations* row = x + min(lane % 8, count - 1);
        rows = shared_address(row) + lane / 16 * SUPER + lane / 8 % 2 * 16;
        digits = reinterpret_cast<const int*>(x[min(lane / 4, count - 1)].digits[0]) + lane % 2;
    }
    // Fragments of 32 values from `first` on: high plane at b[0] and b[1], low at b[2] and b[3].
    DEV void load(int first, int (&b)[4]) const { load_matrices(b, rows + first); }
};

template <class WEIGHT_TILE>
struct TilePair;

template <>
struct TilePair<TiledQ4_K> {
    template <int N>
    DEV static void product(const int* const (&tile)[2], const Columns (&x)[N], float (&u)[N][4]) {
        int lane = lane_id(), t = lane % 4;
        int scales[2][2], mins[2], sum[N][2][4] = {};
        float d[2], dmin[2];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            int4 head = reinterpret_cast<const int4*>(tile[r])[lane / 4];
            int s0 = head.y, s1 = head.z, s2 = head.w;
            scales[r][0] = s0 & 0x3f3f3f3f;
            scales[r][1] = (s2 & 0x0f0f0f0f) | (s0 >> 2 & 0x30303030);
            int low = s1 & 0x3f3f3f3f, high = (s2 >> 4 & 0x0f0f0f0f) | (s1 >> 2 & 0x30303030);
            mins[r] = t == 0 ? low : t == 1 ? high : 0;
            d[r] = mul(half_to_float(uint16(head.x)), 0.0625f);
            dmin[r] = half_to_float(uint16(head.x >> 16));
        }
#pragma unroll
        for (int pair = 0; pair < 4; pair++) {
            int w[4];
#pragma unroll
            for (int i = 0; i < 4; i++) w[i] = tile[i % 2][32 * (1 + 2 * pair + i / 2) + lane];
#pragma unroll
            for (int odd = 0; odd < 2; odd++) {
                // Codes of an odd group are taken where they lie, as 16 times what they are, so that all sums are.
                int group = 2 * pair + odd, scale[2];
                uint32 a[4];
#pragma unroll
                for (int i = 0; i < 4; i++) a[i] = w[i] & (odd ? 0xf0f0f0f0u : 0x0f0f0f0fu);
#pragma unroll
                for (int r = 0; r < 2; r++)
                    scale[r] = __byte_perm(scales[r][group / 4], 0, 0x4440 | group % 4) << (odd ? 0 : 4);
#pragma unroll
                for (int n = 0; n < N; n++) {
                    int b[4];
                    x[n].load(32 * group, b);
#pragma unroll
                    for (int p = 0; p < PLANES; p++) {
                        int dot[4] = {};
                        product32(dot, a, b[2 * p], b[2 * p + 1]);
#pragma unroll
                        for (int i = 0; i < 4; i++) sum[n][p][i] += scale[i / 2] * dot[i];
                    }
                }
            }
        }
#pragma unroll
        for (int n = 0; n < N; n++) {
            int low[4] = {}, middle[4] = {}, high[4] = {};
            product16(low, mins[0], mins[1], x[n].digits[0]);
            product16(middle, mins[0], mins[1], x[n].digits[2]);
            product16(high, mins[0], mins[1], x[n].digits[4]);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                int m = low[i] + (middle[i] << 8) + (high[i] << 16);
                u[n][i] = sub(mul(d[i / 2], combine_planes(sum[n][0][i], sum[n][1][i])),
                              mul(dmin[i / 2], float(m)));
            }
        }
    }
};

template <>
struct TilePair<TiledQ6_K> {
    template <int N>
    DEV static void product(const int* const (&tile)[2], const Columns (&x)[N], float (&u)[N][4]) {
        int lane = lane_id(), sum[N][2][4] = {}, scales[2][4];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            int4 s = reinterpret_cast<const int4*>(tile[r] + 32 * 12)[lane / 4];
            scales[r][0] = s.x, scales[r][1] = s.y, scales[r][2] = s.z, scales[r][3] = s.w;
        }
#pragma unroll
        for (int half = 0; half < 2; half++)  // of the values: 128
#pragma unroll
            for (int odd = 0; odd < 2; odd++) {  // 32 values and, 64 further on, 32 more
                int low[4], top[4];
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    low[i] = tile[i % 2][32 * (4 * half + 2 * odd + i / 2) + lane];
                    top[i] = tile[i % 2][32 * (8 + 2 * half + i / 2) + lane];
                }
#pragma unroll
                for (int upper = 0; upper < 2; upper++) {
                    int group = 8 * half + 4 * upper + 2 * odd, a[4];
#pragma unroll
                    for (int i = 0; i < 4; i++) a[i] = signed_codes_q6(low[i], top[i], upper, odd);
#pragma unroll
                    for (int n = 0; n < N; n++) {
                        int b[4];
                        x[n].load(16 * group, b);
#pragma unroll
                        for (int k = 0; k < 2; k++) {
                            int scale[2];
#pragma unroll
                            for (int r = 0; r < 2; r++)
                                scale[r] = signed_byte_of(scales[r][group / 4], group % 4 + k);
#pragma unroll
                            for (int p = 0; p < PLANES; p++) {
                                int dot[4] = {};
                                product16(dot, a[2 * k], a[2 * k + 1], b[2 * p + k]);
#pragma unroll
                                for (int i = 0; i < 4; i++) sum[n][p][i] += scale[i / 2] * dot[i];
                            }
                        }
                    }
                }
            }
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const uint16* d = reinterpret_cast<const uint16*>(tile[i / 2] + 32 * 13);
            float d4 = scale_q6(d[lane / 4]);
#pragma unroll
            for (int n = 0; n < N; n++) u[n][i] = mul(d4, combine_planes(sum[n][0][i], sum[n][1][i]));
        }
    }
};
