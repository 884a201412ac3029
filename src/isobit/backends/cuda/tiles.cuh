// Q4_K and Q6_K as the GPU keeps them: tiles of 8 rows by one superblock (see layout.py).
// A tile is a sequence of 128-byte lines, each holding one 16-byte chunk of each of its 8 rows, so
// that eight lanes, one a row, read a line at once; the same line is the 8-column operand of an
// int8 tensor-core product. The bytes of a row are those of the file, in the file's order.
#pragma once
#include "copy.cuh"

constexpr int TILE_ROWS = 8;

DEV int byte_of(int word, int i) { return word >> 8 * i & 255; }
DEV int signed_byte_of(int word, int i) { return int8(word >> 8 * i); }

// A lane's superblock of a row, in registers: multiplied with any number of activations.
//
// A slot is a warp's place in shared memory for four tiles, a superblock a lane: chunk i of lane l
// stands at 512 i + 16 l, so that a lane reads what it copied itself, and no bank twice.
struct TiledQ4_K {
    static constexpr int TILE_BYTES = 8 * 144, CHUNKS = 9;
    int4 c[CHUNKS];  // d, dmin, scales; then codes

    DEV void load(const uint8* tile, int row) {
        const int4* p = reinterpret_cast<const int4*>(tile) + row;
#pragma unroll
        for (int i = 0; i < CHUNKS; i++) c[i] = load_once(p + 8 * i);
    }
    DEV static void fetch(const uint8* tile, int row, uint8* slot) {
#pragma unroll
        for (int i = 0; i < CHUNKS; i++)
            copy_async(slot + 512 * i + 16 * lane_id(), tile + 128 * i + 16 * row);
    }
    DEV void load_slot(const uint8* slot) {
#pragma unroll
        for (int i = 0; i < CHUNKS; i++)
            c[i] = reinterpret_cast<const int4*>(slot)[WARP * i + lane_id()];
    }

    // d * T - dmin * f(M) of section 4.
    DEV float dot(const Act& a) const {
        int s0 = c[0].y, s1 = c[0].z, s2 = c[0].w;
        int scales[2] = {s0 & 0x3f3f3f3f, (s2 & 0x0f0f0f0f) | (s0 >> 2 & 0x30303030)};
        int mins[2] = {s1 & 0x3f3f3f3f, (s2 >> 4 & 0x0f0f0f0f) | (s1 >> 2 & 0x30303030)};
        int sum[2] = {0, 0}, m = 0;
#pragma unroll
        for (int pair = 0; pair < 4; pair++) {  // 64 values: groups 2*pair and 2*pair + 1
            int dots[2][2] = {};                // [group][plane]
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int4& q = c[1 + 2 * pair + half];
#pragma unroll
                for (int p = 0; p < PLANES; p++) {
                    const int8* x = a.plane[p] + 64 * pair + 16 * half;
                    int4 x0 = *reinterpret_cast<const int4*>(x);
                    int4 x1 = *reinterpret_cast<const int4*>(x + 32);
                    dots[0][p] = dp4a(q.x & 0x0f0f0f0f, x0.x, dots[0][p]);
                    dots[0][p] = dp4a(q.y & 0x0f0f0f0f, x0.y, dots[0][p]);
                    dots[0][p] = dp4a(q.z & 0x0f0f0f0f, x0.z, dots[0][p]);
                    dots[0][p] = dp4a(q.w & 0x0f0f0f0f, x0.w, dots[0][p]);
                    dots[1][p] = dp4a(q.x >> 4 & 0x0f0f0f0f, x1.x, dots[1][p]);
                    dots[1][p] = dp4a(q.y >> 4 & 0x0f0f0f0f, x1.y, dots[1][p]);
                    dots[1][p] = dp4a(q.z >> 4 & 0x0f0f0f0f, x1.z, dots[1][p]);
                    dots[1][p] = dp4a(q.w >> 4 & 0x0f0f0f0f, x1.w, dots[1][p]);
                }
            }
#pragma unroll
            for (int g = 0; g < 2; g++) {
                int scale = byte_of(scales[pair / 2], pair % 2 * 2 + g);
#pragma unroll
                for (int p = 0; p < PLANES; p++) sum[p] += scale * dots[g][p];
                m += byte_of(mins[pair / 2], pair % 2 * 2 + g) * a.sum32[2 * pair + g];
            }
        }
        float d = half_to_float(uint16(c[0].x)), dmin = half_to_float(uint16(c[0].x >> 16));
        return sub(mul(d, join_planes(sum[0], sum[1])), mul(dmin, float(m)));
    }
};

struct TiledQ6_K {
    static constexpr int TILE_BYTES = 8 * 210, CHUNKS = 13;
    int4 c[CHUNKS];  // 8 chunks of low nibbles, 4 of top bit pairs, the scales
    uint16 d;        // the d of the 8 rows end the tile

    DEV void load(const uint8* tile, int row) {
        const int4* p = reinterpret_cast<const int4*>(tile) + row;
#pragma unroll
        for (int i = 0; i < CHUNKS; i++) c[i] = load_once(p + 8 * i);
        d = reinterpret_cast<const uint16*>(tile + 128 * CHUNKS)[row];
    }
    // The d of a tile, 16 bytes, are copied by the lane of its first row and read by all eight.
    DEV static void fetch(const uint8* tile, int row, uint8* slot) {
#pragma unroll
        for (int i = 0; i < CHUNKS; i++)
            copy_async(slot + 512 * i + 16 * lane_id(), tile + 128 * i + 16 * row);
        if (row == 0) copy_async(slot + 512 * CHUNKS + 2 * lane_id(), tile + 128 * CHUNKS);
    }
    DEV void load_slot(const uint8* slot) {
#pragma unroll
        for (int i = 0; i < CHUNKS; i++)
            c[i] = reinterpret_cast<const int4*>(slot)[WARP * i + lane_id()];
        d = reinterpret_cast<const uint16*>(slot + 512 * CHUNKS)[lane_id()];
    }

    // d * T of section 4. Codes are taken as 0 … 63; sums start at -32 times the activations' sum.
    DEV float dot(const Act& a) const {
        int sum[2] = {0, 0};
#pragma unroll
        for (int chunk = 0; chunk < 8; chunk++) {  // 16 codes at k, 16 at k + 64
            int half = chunk / 4, quarter = chunk / 2 % 2, k = 128 * half + 16 * (chunk % 4);
            const int4& low = c[chunk];
            const int4& top = c[8 + 2 * half + chunk % 2];
            int q0[4], q1[4];
            const int words[2][4] = {{low.x, low.y, low.z, low.w}, {top.x, top.y, top.z, top.w}};
#pragma unroll
            for (int i = 0; i < 4; i++) {
                q0[i] = (words[0][i] & 0x0f0f0f0f) |
                        ((quarter ? words[1][i] << 2 : words[1][i] << 4) & 0x30303030);
                q1[i] = (words[0][i] >> 4 & 0x0f0f0f0f) |
                        ((quarter ? words[1][i] >> 2 : words[1][i]) & 0x30303030);
            }
            const int scales[4] = {c[12].x, c[12].y, c[12].z, c[12].w};
            int g0 = k / 16, g1 = g0 + 4;
            int scale0 = signed_byte_of(scales[g0 / 4], g0 % 4);
            int scale1 = signed_byte_of(scales[g1 / 4], g1 % 4);
#pragma unroll
            for (int p = 0; p < PLANES; p++) {
                int4 x0 = *reinterpret_cast<const int4*>(a.plane[p] + k);
                int4 x1 = *reinterpret_cast<const int4*>(a.plane[p] + k + 64);
                int dot0 = a.neg16[p][g0], dot1 = a.neg16[p][g1];
                dot0 = dp4a(q0[0], x0.x, dot0);
                dot1 = dp4a(q1[0], x1.x, dot1);
                dot0 = dp4a(q0[1], x0.y, dot0);
                dot1 = dp4a(q1[1], x1.y, dot1);
                dot0 = dp4a(q0[2], x0.z, dot0);
                dot1 = dp4a(q1[2], x1.z, dot1);
                dot0 = dp4a(q0[3], x0.w, dot0);
                dot1 = dp4a(q1[3], x1.w, dot1);
                sum[p] += scale0 * dot0;
                sum[p] += scale1 * dot1;
            }
        }
        return mul(half_to_float(d), join_planes(sum[0], sum[1]));
    }
};
