// SHA-256 (FIPS 180-4) of many pieces at once, one in each lane, and the tree of digests of a row.

#include "../engine/simd_op.h"
#include "sha256.h"

#ifndef ISOBIT_LEVEL
#include "digest.h"
#endif

namespace isobit {

// n pieces of `length` bytes, one after the other; a digest each.
template <Level>
struct Sha256 {
    static void run(const uint8_t* data, size_t length, int n, uint8_t* out);
};

#ifdef ISOBIT_LEVEL

static const uint32_t ROUND[64] = {SHA256_ROUND};
static const uint32_t START[8] = {SHA256_START};

FN U rotated(U x, int n) { return x >> n | x << (32 - n); }

#ifdef __AVX512F__
#define ISOBIT_BITWISE(table) (U)_mm512_ternarylogic_epi32((__m512i)a, (__m512i)b, (__m512i)c, table)
FN U odd(U a, U b, U c) { return ISOBIT_BITWISE(0x96); }
FN U choice(U a, U b, U c) { return ISOBIT_BITWISE(0xca); }
FN U majority(U a, U b, U c) { return ISOBIT_BITWISE(0xe8); }
#undef ISOBIT_BITWISE
#else
FN U odd(U a, U b, U c) { return a ^ b ^ c; }
FN U choice(U a, U b, U c) { return c ^ (a & (b ^ c)); }
FN U majority(U a, U b, U c) { return (a & b) | (c & (a | b)); }
#endif

FN void rounds(U* w, U* state) {
    U a = state[0], b = state[1], c = state[2], d = state[3];
    U e = state[4], f = state[5], g = state[6], h = state[7];
    for (int i = 0; i < 64; i += 16)
#pragma GCC unroll 16
        for (int j = 0; j < 16; ++j) {
            if (i) {
                const U x = w[(j + 1) % 16], y = w[(j + 14) % 16];
                w[j] += w[(j + 9) % 16] + odd(rotated(x, 7), rotated(x, 18), x >> 3) +
                        odd(rotated(y, 17), rotated(y, 19), y >> 10);
            }
            const U s = h + odd(rotated(e, 6), rotated(e, 11), rotated(e, 25)) + choice(e, f, g) +
                        (w[j] + ROUND[i + j]);
            h = g, g = f, f = e, e = d + s;
            d = c;
            const U t = odd(rotated(a, 2), rotated(a, 13), rotated(a, 22)) + majority(a, b, c);
            c = b, b = a, a = s + t;
        }
    const U now[8] = {a, b, c, d, e, f, g, h};
    for (int i = 0; i < 8; ++i) state[i] += now[i];
}

template <>
void Sha256<LEVEL>::run(const uint8_t* data, size_t length, int n, uint8_t* out) {
    const size_t blocks = (length + 9 + 63) / 64, whole = length / 64;
    for (int first = 0; first < n; first += LANES) {
        U state[8];
        for (int i = 0; i < 8; ++i) state[i] = START[i] - U{};
        for (size_t block = 0; block < blocks; ++block) {
            alignas(64) uint32_t words[16][LANES];
            for (int lane = 0; lane < LANES; ++lane) {
                const int piece = first + lane < n ? first + lane : n - 1;
                const uint8_t* bytes = data + piece * length + block * 64;
                uint8_t last[64];
                if (block >= whole) {  // its end, a bit, zeros, and its number of bits
                    memset(last, 0, sizeof last);
                    const size_t left = block == whole ? length % 64 : 0;
                    memcpy(last, bytes, left);
                    if (block == whole) last[left] = 0x80;
                    const uint64_t bits = __builtin_bswap64((uint64_t)length * 8);
                    if (block == blocks - 1) memcpy(last + 56, &bits, 8);
                    bytes = last;
                }
                for (int i = 0; i < 16; ++i) {
                    uint32_t word;
                    memcpy(&word, bytes + 4 * i, 4);
                    words[i][lane] = __builtin_bswap32(word);
                }
            }
            U w[16];
            memcpy(w, words, sizeof w);
            rounds(w, state);
        }
        for (int lane = 0; lane < LANES && first + lane < n; ++lane)
            for (int i = 0; i < 8; ++i) {
                const uint32_t word = __builtin_bswap32(state[i][lane]);
                memcpy(out + (first + lane) * DIGEST_BYTES + 4 * i, &word, 4);
            }
    }
}

#else

constexpr size_t PIECE = 256;

void TreeDigest::operator()(const uint8_t* data, size_t bytes, uint8_t* out) {
    const auto sha256 = run_of<Sha256>(kernels_);
    for (int level = 0; bytes > PIECE; level ^= 1) {
        const size_t whole = bytes / PIECE, rest = bytes % PIECE;
        std::vector<uint8_t>& next = levels_[level];
        next.resize((whole + (rest != 0)) * DIGEST_BYTES);
        sha256(data, PIECE, (int)whole, next.data());
        if (rest) sha256(data + whole * PIECE, rest, 1, &next[whole * DIGEST_BYTES]);
        data = next.data();
        bytes = next.size();
    }
    sha256(data, bytes, 1, out);
}

#endif

}  // namespace isobit
