// A level of the tree of digests of rows (isobit.numerics.digest): SHA-256 (FIPS 180-4) of each piece of up to 64
// words of a row, a piece a thread. Memory is little-endian, the words of SHA-256 are not.
#include "common.cuh"

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
    constexpr uint32 K[64] = {
        0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
        0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
        0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
        0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
        0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
        0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
        0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
        0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};
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
    State s = {{0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19}};
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
