// Formats of one to three bits: a row's superblock at a time, its codes as bytes in the order of the
// values, as many in a vector as fit. Layouts: isobit/gguf/blocks.py and grids.py.
//
// prepare() writes what codes() needs and the sub-scales of each 16 values, if the format has any: all
// rows are prepared before the first's codes are looked up, so that no look-up waits for its index.
// codes() calls put(c, codes) for each vector c; codes are `zero` too large.
#pragma once

#include "grids.h"

namespace isobit::ISOBIT_SIMD {

constexpr int BYTES = 4 * LANES, VECTORS = SUPERBLOCK / BYTES;
typedef uint8_t Bytes __attribute__((vector_size(BYTES)));
typedef uint64_t Eights __attribute__((vector_size(BYTES)));  // of bytes
typedef uint8_t EachByte __attribute__((vector_size(LANES)));

// Of 32 bytes, whatever the level has.
typedef uint32_t Words8 __attribute__((vector_size(32)));
typedef uint16_t Halves16 __attribute__((vector_size(32)));
typedef uint8_t Bytes32 __attribute__((vector_size(32)));
typedef uint8_t Bytes16 __attribute__((vector_size(16)));
typedef uint8_t Bytes8 __attribute__((vector_size(8)));
typedef uint16_t Halves8 __attribute__((vector_size(16)));

template <class T>
FN void fetch(T& out, const void* p) {
    memcpy(&out, p, sizeof out);
}
template <class T>
FN void leave(void* p, const T& v) {
    memcpy(p, &v, sizeof v);
}

FN uint16_t half_at(const uint8_t* p) {
    uint16_t x;
    memcpy(&x, p, 2);
    return x;
}
FN uint64_t eight_at(const void* p) {
    uint64_t x;
    memcpy(&x, p, 8);
    return x;
}

// A vector of rows of eight bytes.
template <class At>
FN U of_eights(At&& at) {
    if constexpr (LANES == 16)
        return (U)Eights{at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7)};
    else if constexpr (LANES == 8)
        return (U)Eights{at(0), at(1), at(2), at(3)};
    else
        return (U)Eights{at(0), at(1)};
}
// Rows of four: each from the eight bytes that begin or end with it, of which a half is taken.
template <class At>
FN U of_fours(At&& at) {
    auto first = [&](int j) __attribute__((always_inline)) { return eight_at(at(2 * j)); };
    auto second = [&](int j) __attribute__((always_inline)) { return eight_at(at(2 * j + 1) - 1); };
    const Eights low = Eights{} + 0xffffffff;
    return (U)(((Eights)of_eights(first) & low) | ((Eights)of_eights(second) & ~low));
}

// A vector of runs of 16 bytes.
typedef uint64_t Two __attribute__((vector_size(16)));
template <class At>
FN U of_sixteens(At&& at) {
    auto four = [&](auto j) __attribute__((always_inline)) {  // auto: made only where it is called
        return __builtin_shufflevector(at(j), at(j + 1), 0, 1, 2, 3);
    };
    if constexpr (LANES == 16)
        return (U)__builtin_shufflevector(four(0), four(2), 0, 1, 2, 3, 4, 5, 6, 7);
    else if constexpr (LANES == 8)
        return (U)four(0);
    else
        return (U)at(0);
}
// 32 bytes as often as a vector has room for them, or its part of them.
FN U of_thirty_two(const uint8_t* p) {
#ifdef __AVX512F__
    return (U)_mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i*)p));
#else
    return load(p);
#endif
}
FN Two sixteen_at(const uint8_t* p) {
    Two x;
    memcpy(&x, p, 16);
    return x;
}

struct alignas(32) Prepared {
    int16_t scales[16];
    uint16_t index[64];  // rows of the grid
    uint8_t bits[40];    // signs of eight values, or what is less in them; eight bytes are read from any
};

FN void widen(Halves16& out, const uint8_t* p) {
#ifdef __AVX2__
    out = (Halves16)_mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)p));
#else
    Bytes16 b;
    fetch(b, p);
    out = __builtin_convertvector(b, Halves16);
#endif
}
FN void widen(Words8& out, const uint8_t* p) {
#ifdef __AVX2__
    out = (Words8)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
#else
    Bytes8 b;
    fetch(b, p);
    out = __builtin_convertvector(b, Words8);
#endif
}

// 2 s + 1 of eight words, for 32 values each; of two 16-bit integers a word, for 16 values each.
FN void leave_odd(int16_t* scales, const Words8& s) { leave(scales, s * 0x20002u + 0x10001u); }
FN void leave_odd_pairs(int16_t* scales, const Words8& s) { leave(scales, s * 2 + 0x10001u); }

// Eight bytes, each of two scales.
FN void leave_odd_nibbles(int16_t* scales, const uint8_t* p) {
    Words8 w;
    widen(w, p);
    leave_odd_pairs(scales, (w & 15) | (w & 0xf0) << 12);
}

// Four times seven sign bits in each word become four bytes of eight, whose number is even.
FN void eighth_signs(Words8& w) {
    w = (w & 0x7f) | (w << 1 & 0x7f00) | (w << 2 & 0x7f0000) | (w << 3 & 0x7f000000);
    Words8 odd = w ^ w >> 4;
    odd ^= odd >> 2;
    odd ^= odd >> 1;
    w |= (odd & BIT) << 7;
}

// 16 values: a byte twice in each, for as many as share it.
template <int share>
FN void spread_bytes(Halves16& out, const uint8_t* p) {
    const uint64_t x = eight_at(p);
    typedef uint64_t Same __attribute__((vector_size(32)));
    const Bytes32 b = (Bytes32)Same{x, x, x, x};
    if constexpr (share == 4)
        out = (Halves16)__builtin_shufflevector(b, b, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1,
                                                18, 18, 18, 18, 18, 18, 18, 18, 19, 19, 19, 19, 19,
                                                19, 19, 19);
    else
        out = (Halves16)__builtin_shufflevector(b, b, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
                                                17, 17, 17, 17, 17, 17, 17, 17, 17, 17, 17, 17, 17,
                                                17, 17, 17);
}
template <int type, int size, int zero_, int groups>
struct FewBits {
    static constexpr int id = type, block = SUPERBLOCK, bytes = size, part = SUPERBLOCK,
                         zero = zero_;
    static constexpr bool scaled = groups > 1;
    FN uint32_t d(const uint8_t* b, int) { return half_at(b); }
    FN void prepare(const uint8_t*, Prepared&) {}
    static constexpr float d_unit = 1;  // what d counts
};

}  // namespace isobit::ISOBIT_SIMD
