// TQ1_0, TQ2_0, Q1_0 and Q2_0: codes of one and two bits, and of digits of three
// (few_bits.h says what a format gives).
#pragma once

#include "few_bits.h"

namespace isobit::ISOBIT_SIMD {

// Digits of bytes that are 256 * n / 243, highest first: of 16 values one after another.
struct TQ1_0 : FewBits<34, 54, 1, 1> {
    FN uint32_t d(const uint8_t* b, int) { return half_at(b + 52); }

    template <class Put>
    FN void codes(const uint8_t* b, const Prepared&, Put&& put) {
        constexpr uint16_t powers[5] = {1, 3, 9, 27, 81};
        typedef uint16_t Halves __attribute__((vector_size(BYTES)));
        uint32_t last;
        memcpy(&last, b + 48, 4);
#pragma GCC unroll 16
        for (int c = 0; c < VECTORS; ++c) {
            auto run = [&](int j) __attribute__((always_inline)) {
                const int i = c * LANES / 4 + j;
                if (i == 15) return last * 0x100000001ull - Two{};
                return sixteen_at(b + (i < 10 ? i % 2 * 16 : 32));
            };
            auto power = [&](int j) __attribute__((always_inline)) -> uint64_t {
                const int run = c * LANES / 4 + j / 2, n = run < 10 ? run / 2 : run - 10;
                if (run == 15) return j % 2 ? 0x001b001b00090009 : 0x0003000300010001;
                return powers[n] * 0x0001000100010001ull;
            };
            const bool whole = (c + 1) * BYTES <= 160;  // of the first 32 bytes
            const Halves x = (Halves)(whole ? of_thirty_two(b + c * BYTES % 32) : of_sixteens(run));
            const Halves p = (Halves)of_eights(power);
            const Bytes y = (Bytes)((x * p & 0xff) | (x & 0xff00) * p);
            put(c, (U)(-(Bytes)(y > 85) - (Bytes)(y > 170)));  // y * 3 / 256
        }
    }
};

struct TQ2_0 : FewBits<35, 66, 1, 1> {
    FN uint32_t d(const uint8_t* b, int) { return half_at(b + 64); }

    template <class Put>
    FN void codes(const uint8_t* b, const Prepared&, Put&& put) {
#pragma GCC unroll 16
        for (int c = 0; c < VECTORS; ++c) {
            const int at = c * BYTES;
            auto shift = [&](int j) __attribute__((always_inline)) -> uint64_t {
                return (at + 8 * j) % 128 / 32 * 2 * 0x100000001ull;
            };
            put(c, of_thirty_two(b + at / 128 * 32 + at % 32) >> of_eights(shift) & LOW2);
        }
    }
};

struct Q1_0 : FewBits<41, 18, 1, 1> {
    static constexpr int block = 128, part = 128;
    FN uint32_t d(const uint8_t* b, int i) { return half_at(b + 18 * i); }

    template <class Put>
    FN void codes(const uint8_t* b, const Prepared&, Put&& put) {
#pragma GCC unroll 16
        for (int c = 0; c < VECTORS; ++c) {
            const int at = c * BYTES;
            put(c, negated(U{}, 2, b + at / 128 * 18 + 2 + at % 128 / 8));
        }
    }
};

// A byte's four pairs of bits as four bytes, for as many bytes as there are lanes.
FN U pairs_as_bytes(const uint8_t* p) {
    EachByte b;
    fetch(b, p);
    const Bytes16 table = __builtin_shufflevector(
        b, b, 0, 1, 2, 3, 4 % LANES, 5 % LANES, 6 % LANES, 7 % LANES, 8 % LANES, 9 % LANES,
        10 % LANES, 11 % LANES, 12 % LANES, 13 % LANES, 14 % LANES, 15 % LANES);
    U which;  // each byte four times
#pragma GCC unroll 16
    for (int j = 0; j < LANES; ++j) which[j] = j * 0x01010101u;
    const U q =
        look_up(of_sixteens([&](int) __attribute__((always_inline)) { return (Two)table; }), which);
    return (q & 3) | (q >> 2 & 0x300) | (q >> 4 & 0x30000) | (q >> 6 & 0x3000000);
}

struct Q2_0 : FewBits<42, 18, 1, 1> {
    static constexpr int block = 64, part = 64;
    FN uint32_t d(const uint8_t* b, int i) { return half_at(b + 18 * i); }

    template <class Put>
    FN void codes(const uint8_t* b, const Prepared&, Put&& put) {
#pragma GCC unroll 16
        for (int c = 0; c < VECTORS; ++c) {
            const int at = c * BYTES;
            put(c, pairs_as_bytes(b + at / 64 * 18 + 2 + at % 64 / 4));
        }
    }
};

#define ISOBIT_FEW_BITS(X)                                                                        \
    X(IQ1_S) X(IQ1_M) X(IQ2_XXS) X(IQ2_XS) X(IQ2_S) X(IQ3_XXS) X(IQ3_S) X(TQ1_0) X(TQ2_0) X(Q1_0)  \
    X(Q2_0)

}  // namespace isobit::ISOBIT_SIMD
