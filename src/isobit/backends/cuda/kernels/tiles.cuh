// Formats as the GPU keeps them: tiles of 8 rows by one superblock (see layout.py).
// A tile is a sequence of 128-byte lines, each holding one 16-byte chunk of each of its 8 rows, so
// that eight lanes, one a row, read a line at once; the same line is the 8-column operand of an
// int8 tensor-core product. The bytes of a row are those of the file, in the file's order.
#pragma once
#include "formats.cuh"

constexpr int TILE_ROWS = 8;

DEV int byte_of(int word, int i) { return word >> 8 * i & 255; }

// A lane's superblock of a row. In registers it is multiplied with any number of activations; from
// shared memory with those of N tokens, which lie `step` blocks apart, in a loop, for kernels that run
// once and are short for it.
struct TiledQ4_K {
    static constexpr int TILE_BYTES = 8 * 144, CHUNKS = 9;
    int4 c[CHUNKS];  // d, dmin, scales; then codes

    DEV void load(const uint8* tile, int row) {
        const int4* p = reinterpret_cast<const int4*>(tile) + row;
#pragma unroll
        for (int i = 0; i < CHUNKS; i++) c[i] = load_once(p + 8 * i);
    }
    // d * T - dmin * f(M) of section 4.
    DEV float dot(const ActivationBlock& a) const {
        Sums<1> sums(c[0]);
#pragma unroll
        for (int pair = 0; pair < 4; pair++) sums.add_pair(pair, c[1 + 2 * pair], c[2 + 2 * pair], &a, 0);
        return sums.value(c[0].x, 0);
    }
    template <int N>
    DEV static void dots_shared(const uint8* tile, int row, const ActivationBlock* a, int step, float (&t)[N]) {
        const int4* p = reinterpret_cast<const int4*>(tile) + row;
        int4 head = p[0];
        Sums<N> sums(head);
#pragma unroll 1
        for (int pair = 0; pair < 4; pair++) sums.add_pair(pair, p[8 + 16 * pair], p[16 + 16 * pair], a, step);
#pragma unroll
        for (int n = 0; n < N; n++) t[n] = sums.value(head.x, n);
    }

   private:
    // The codes of an odd group are taken where they lie, as 16 times what they are, so that all sums are: at most
    // 495,452,160 (docs/numerics.md, section 1). A sixteenth of d is exact.
    template <int N>
    struct Sums {
        uint64 scales, mins;            // of the groups from here on, a byte each
        int sum[N][2] = {}, m[N] = {};  // of a token

        DEV Sums(int4 head) {
            uint32 s0 = head.y, s1 = head.z, s2 = head.w;
            scales = uint64((s2 & 0x0f0f0f0f) | (s0 >> 2 & 0x30303030)) << 32 | (s0 & 0x3f3f3f3f);
            mins = uint64((s2 >> 4 & 0x0f0f0f0f) | (s1 >> 2 & 0x30303030)) << 32 | (s1 & 0x3f3f3f3f);
        }
        // The next 64 values: groups 2 * pair (the low nibbles) and 2 * pair + 1.
        DEV void add_pair(int pair, int4 first, int4 second, const ActivationBlock* a, int step) {
            const int4 q[2] = {first, second};
            int dots[N][2][2] = {};  // [token][group][plane]
#pragma unroll
            for (int half = 0; half < 2; half++)
#pragma unroll
                for (int n = 0; n < N; n++)
#pragma unroll
                    for (int p = 0; p < PLANES; p++) {
                        const int8* x = a[n * step].plane[p] + 64 * pair + 16 * half;
                        int4 x0 = *reinterpret_cast<const int4*>(x);
                        int4 x1 = *reinterpret_cast<const int4*>(x + 32);
                        int &low = dots[n][0][p], &high = dots[n][1][p];
                        low = dp4a(q[half].x & 0x0f0f0f0f, x0.x, low);
                        high = dp4a(q[half].x & 0xf0f0f0f0u, x1.x, high);
                        low = dp4a(q[half].y & 0x0f0f0f0f, x0.y, low);
                        high = dp4a(q[half].y & 0xf0f0f0f0u, x1.y, high);
                        low = dp4a(q[half].z & 0x0f0f0f0f, x0.z, low);
                        high = dp4a(q[half].z & 0xf0f0f0f0u, x1.z, high);
                        low = dp4a(q[half].w & 0x0f0f0f0f, x0.w, low);
                        high = dp4a(q[half].w & 0xf0f0f0f0u, x1.w, high);
                    }
            const int scale[2] = {byte_of(int(scales), 0) << 4, byte_of(int(scales), 1)};
            const int min[2] = {byte_of(int(mins), 0), byte_of(int(mins), 1)};
            scales >>= 16, mins >>= 16;
#pragma unroll
            for (int n = 0; n < N; n++)
#pragma unroll
                for (int g = 0; g < 2; g++) {
#pragma unroll
                    for (int p = 0; p < PLANES; p++) sum[n][p] += scale[g] * dots[n][g][p];
                    m[n] += min[g] * a[n * step].sum32[2 * pair + g];
                }
        }
        DEV float value(int halves, int n) const {
            float d = mul(half_to_float(uint16(halves)), 0.0625f), dmin = half_to_float(uint16(halves >> 16));
            return sub(mul(d, combine_planes(sum[n][0], sum[n][1])), mul(dmin, float(m[n])));
        }
    };
};

// Four codes of Q6_K less 32, times 4, as signed bytes, so that sums are at most 536,870,912: of the lower or upper 64 of 128 values the first or the odd 32.
DEV int signed_codes_q6(uint32 low, uint32 top, bool upper, bool odd) {
    uint32 flipped = top ^ 0xaaaaaaaa;  // the upper of two bits says whether a code is below 32
#ifndef EMULATED
    asm("" : "+r"(flipped));  // once for all four
#endif
    return ((upper ? low >> 2 : low << 2) & 0x3c3c3c3c) | (flipped << (6 - 4 * upper - 2 * odd) & 0xc0c0c0c0);
}

// d of a superblock, for sums of these.
DEV float scale_q6(uint16 d) { return mul(half_to_float(d), 0.25f); }

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
    // d * T of section 4.
    DEV float dot(const ActivationBlock& a) const {
        int sum[1][2] = {};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int4 low[2] = {c[4 * (i / 2) + i % 2], c[4 * (i / 2) + i % 2 + 2]};
            add_quarter(i, low, c[8 + i], i < 2 ? c[12].x : c[12].z, i < 2 ? c[12].y : c[12].w, &a, 0, sum);
        }
        return mul(scale_q6(d), combine_planes(sum[0][0], sum[0][1]));
    }
    template <int N>
    DEV static void dots_shared(const uint8* tile, int row, const ActivationBlock* a, int step, float (&t)[N]) {
        const int4* p = reinterpret_cast<const int4*>(tile) + row;
        int sum[N][2] = {};
#pragma unroll 1
        for (int i = 0; i < 4; i++) {
            const int4* at = p + 8 * (4 * (i / 2) + i % 2);
            const int4 low[2] = {at[0], at[16]};
            const int2 s = reinterpret_cast<const int2*>(p + 96)[i / 2];
            add_quarter(i, low, p[8 * (8 + i)], s.x, s.y, a, step, sum);
        }
        float d4 = scale_q6(reinterpret_cast<const uint16*>(tile + 128 * CHUNKS)[row]);
#pragma unroll
        for (int n = 0; n < N; n++) t[n] = mul(d4, combine_planes(sum[n][0], sum[n][1]));
    }

   private:
    // Quarter i of the values: 16 from k = 128 (i/2) + 16 (i%2) on, and from k + 32, k + 64 and k + 96.
    // s0, s1: the words that hold the scales of the lower and of the upper two.
    template <int N>
    DEV static void add_quarter(int i, const int4 (&low)[2], int4 top, int s0, int s1, const ActivationBlock* a, int step,
                                int (&sum)[N][2]) {
        const uint32 t[4] = {uint32(top.x), uint32(top.y), uint32(top.z), uint32(top.w)};
#pragma unroll
        for (int odd = 0; odd < 2; odd++) {
            int k = 128 * (i / 2) + 16 * (i % 2) + 32 * odd;
            const uint32 l[4] = {uint32(low[odd].x), uint32(low[odd].y), uint32(low[odd].z), uint32(low[odd].w)};
            int q0[4], q1[4];
#pragma unroll
            for (int w = 0; w < 4; w++) {
                q0[w] = signed_codes_q6(l[w], t[w], false, odd);
                q1[w] = signed_codes_q6(l[w], t[w], true, odd);
            }
            int scale0 = signed_byte_of(s0, 2 * odd + i % 2), scale1 = signed_byte_of(s1, 2 * odd + i % 2);
#pragma unroll
            for (int n = 0; n < N; n++)
#pragma unroll
                for (int p = 0; p < PLANES; p++) {
                    const ActivationBlock& x = a[n * step];
                    int4 x0 = *reinterpret_cast<const int4*>(x.plane[p] + k);
                    int4 x1 = *reinterpret_cast<const int4*>(x.plane[p] + k + 64);
                    int dot0 = dp4a(q0[0], x0.x, 0), dot1 = dp4a(q1[0], x1.x, 0);
                    dot0 = dp4a(q0[1], x0.y, dot0);
                    dot1 = dp4a(q1[1], x1.y, dot1);
                    dot0 = dp4a(q0[2], x0.z, dot0);
                    dot1 = dp4a(q1[2], x1.z, dot1);
                    dot0 = dp4a(q0[3], x0.w, dot0);
                    dot1 = dp4a(q1[3], x1.w, dot1);
                    sum[n][p] += scale0 * dot0;
                    sum[n][p] += scale1 * dot1;
                }
        }
    }
};

// IQ4_NL, IQ4_XS and MXFP4: blocks that may begin inside words, so a row's superblock is kept as words.
template <int BYTES>
struct TiledWords {
    static constexpr int TILE_BYTES = 8 * BYTES, CHUNKS = BYTES / 16;
    int w[BYTES / 4];

    DEV void load(const uint8* tile, int row) {
        const int4* p = reinterpret_cast<const int4*>(tile) + row;
#pragma unroll
        for (int i = 0; i < CHUNKS; i++) {
            int4 c = load_once(p + 8 * i);
            w[4 * i] = c.x, w[4 * i + 1] = c.y, w[4 * i + 2] = c.z, w[4 * i + 3] = c.w;
        }
        if (BYTES % 16) {
            int2 end = load_once(reinterpret_cast<const int2*>(tile + 128 * CHUNKS) + row);
            w[BYTES / 4 - 2] = end.x, w[BYTES / 4 - 1] = end.y;
        }
    }

   protected:
    DEV int byte(int at) const { return byte_of(w[at / 4], at % 4); }
    DEV float half(int at) const { return half_to_float(uint16(w[at / 4] >> at % 4 * 8)); }
    // Dot products of 32 values from k on, whose 16 bytes of nibbles begin at byte `at`.
    template <class Codes>
    DEV void dots(int at, int k, const ActivationBlock& a, Codes codes, int (&sum)[2]) const {
        int q[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int* from = w + at / 4 + i;
            q[i] = at % 4 ? __byte_perm(from[0], from[1], 0x3210 + at % 4 * 0x1111) : from[0];
        }
#pragma unroll
        for (int p = 0; p < PLANES; p++) {
            int4 x0 = *reinterpret_cast<const int4*>(a.plane[p] + k);
            int4 x1 = *reinterpret_cast<const int4*>(a.plane[p] + k + 16);
            const int x[2][4] = {{x0.x, x0.y, x0.z, x0.w}, {x1.x, x1.y, x1.z, x1.w}};
            sum[p] = 0;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                sum[p] = dp4a(codes(q[i] & 0x0f0f0f0f), x[0][i], sum[p]);
                sum[p] = dp4a(codes(q[i] >> 4 & 0x0f0f0f0f), x[1][i], sum[p]);
            }
        }
    }
};

struct TiledIQ4_NL : TiledWords<144> {
    // t of section 4: eight blocks, each d * T.
    DEV float dot(const ActivationBlock& a) const {
        float t = 0.0f;
#pragma unroll
        for (int b = 0; b < 8; b++) {
            int sum[2] = {0, 0};
            dots(18 * b + 2, 32 * b, a, iq4_codes, sum);
            t = add(t, mul(half(18 * b), combine_planes(sum[0], sum[1])));
        }
        return t;
    }
};

struct TiledMXFP4 : TiledWords<136> {
    DEV float dot(const ActivationBlock& a) const {
        float t = 0.0f;
#pragma unroll
        for (int b = 0; b < 8; b++) {
            int sum[2] = {0, 0};
            dots(17 * b + 1, 32 * b, a, fp4_codes, sum);
            t = add(t, mul(power_of_two(byte(17 * b)), combine_planes(sum[0], sum[1])));
        }
        return t;
    }
};

struct TiledIQ4_XS : TiledWords<136> {
    DEV float dot(const ActivationBlock& a) const {
        int total[2] = {0, 0};
#pragma unroll
        for (int g = 0; g < 8; g++) {
            int sum[2] = {0, 0}, low = w[1] >> 4 * g & 15, top = w[0] >> (16 + 2 * g) & 3;
            dots(8 + 16 * g, 32 * g, a, iq4_codes, sum);
#pragma unroll
            for (int p = 0; p < PLANES; p++) total[p] += ((low | top << 4) - 32) * sum[p];
        }
        return mul(half(0), combine_planes(total[0], total[1]));
    }
};
