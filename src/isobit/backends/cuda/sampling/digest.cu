// A level of the tree of digests of rows (isobit.numerics.digest): SHA-256 (FIPS 180-4) of each piece of up to 64
// words of a row, a piece a thread. Memory is little-endian, the words of SHA-256 are not.
#include "common.cuh"
#include "sha256.h"

DEV uint32 right(uint32 x, int n) { return x >> n | x << (32 - n); }
DEV uint32 swapped(uint32 x) { return __byte_perm(x, 0, 0x0123); }

struct State {
    uint32 h[8];
};

// Sixteen rounds, then the words that come sixteen later.
DEV void rounds(uint32 (&s)[8], uint32 (&w)[16], const uint32* k, bool more) {
#pragma unroll
    for (int i = 0; i < 16; i++) {
        uint32 a = s[(16 - i) % 8], e = s[(20 - i) % 8], &d = s[(19 - i) % 8], &h = s[(23 - i) % 8];
        uint32 b = s[(17 - i) % 8], c = s[(18 - i) % 8], f = s[(21 - i) % 8], g = s[(22 - i) % 8];
        uint32 t = h + k[i] + w[i] + (g ^ (e & (f ^ g))) + (right(e, 6) ^ right(e, 11) ^ right(e, 25));
        d += t;
        h = t + ((a & b) | (c & (a | b))) + (right(a, 2) ^ right(a, 13) ^ right(a, 22));
        if (more) {
            uint32 x = w[(i + 1) % 16], y = w[(i + 14) % 16];
            w[i] += (right(x, 7) ^ right(x, 18) ^ x >> 3) + w[(i + 9) % 16] +
                    (right(y, 17) ^ right(y, 19) ^ y >> 10);
        }
    }
}

DEV void block(State& start, uint32 (&w)[16]) {
    constexpr uint32 K[64] = {SHA256_ROUND};
    State s = start;
#pragma unroll
    for (int i = 0; i < 64; i += 16) rounds(s.h, w, K + i, i < 48);
    for (int i = 0; i < 8; i++) start.h[i] += s.h[i];
}

// words: of a row, which are `stride` apart. found: 8 words a piece, from row to row `found_stride`.
KERNEL(64) digest(const uint32* rows, int words, int stride, uint32* found, int found_stride) {
    begin();
    int piece = blockIdx.x * 64 + threadIdx.x;
    if (64 * piece >= words) return;
    int n = min(64, words - 64 * piece), blocks = (n + 18) / 16;
    const uint32* row = rows + int64(blockIdx.y) * stride + 64 * piece;
    State s = {{SHA256_START}};
    for (int b = 0; b < blocks; b++) {  // padded: a bit, zeros, its number of bits
        uint32 w[16];
#pragma unroll
        for (int i = 0; i < 16; i++) {
            int at = 16 * b + i;
            w[i] = at < n ? swapped(row[at]) : at == n ? 0x80000000u : at == 16 * blocks - 1 ? 32u * n : 0u;
        }
        block(s, w);
    }
    uint32* out = found + int64(blockIdx.y) * found_stride + 8 * piece;
    for (int i = 0; i < 8; i++) out[i] = swapped(s.h[i]);
}
