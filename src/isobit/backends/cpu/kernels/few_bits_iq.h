// IQ1 to IQ3: codes that are rows of a grid (few_bits.h says what a format gives).
#pragma once

#include "few_bits.h"

namespace isobit::ISOBIT_SIMD {

struct IQ2_XXS : FewBits<16, 66, IQ2_ZERO, 8> {
    static constexpr float d_unit = 0.125f;

    FN void prepare(const uint8_t* b, Prepared& p) {
        Words8 low, high;  // of each 32 values four indices, then signs and the scale
        fetch(low, b + 2);
        fetch(high, b + 34);
        Words8 w = __builtin_shufflevector(low, high, 1, 3, 5, 7, 9, 11, 13, 15);
        leave_odd(p.scales, w >> 28);
        eighth_signs(w);
        leave(p.bits, w);
    }

    template <class Put>
    FN void codes(const uint8_t* b, const Prepared& p, Put&& put) {
#pragma GCC unroll 16
        for (int c = 0; c < VECTORS; ++c) {
            const int i = c * LANES / 2;
            auto row = [&](int j) __attribute__((always_inline)) {
                return grid_IQ2_XXS.row[b[2 + (i + j) / 4 * 8 + (i + j) % 4]];
            };
            put(c, negated(of_eights(row), 2 * zero, p.bits + i));
        }
    }
};

struct IQ2_XS : FewBits<17, 74, IQ2_ZERO, 16> {
    static constexpr float d_unit = 0.125f;

    FN void prepare(const uint8_t* b, Prepared& p) {
        leave_odd_nibbles(p.scales, b + 66);
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
            Halves16 q;
            fetch(q, b + 2 + 32 * i);
            leave(p.index + 16 * i, q & 511);
            Halves16 odd = q >> 9;
            odd ^= odd >> 4;
            odd ^= odd >> 2;
            odd ^= odd >> 1;
            leave(p.bits + 16 * i,
                  __builtin_convertvector(q >> 9 | (odd & 1) << 7, Bytes16));
        }
    }

    template <class Put>
    FN void codes(const uint8_t*, const Prepared& p, Put&& put) {
#pragma GCC unroll 16
        for (int c = 0; c < VECTORS; ++c) {
            const int i = c * LANES / 2;
            auto row = [&](int j) __attribute__((always_inline)) { return grid_IQ2_XS.row[p.index[i + j]]; };
            put(c, negated(of_eights(row), 2 * zero, p.bits + i));
        }
    }
};

struct IQ2_S : FewBits<22, 82, IQ2_ZERO, 16> {
    static constexpr float d_unit = 0.125f;

    FN void prepare(const uint8_t* b, Prepared& p) {
        leave_odd_nibbles(p.scales, b + 74);
        constexpr Halves16 bits = {256, 64, 16, 4, 256, 64, 16, 4, 256, 64, 16, 4, 256, 64, 16, 4};
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
            Halves16 low, high;
            widen(low, b + 2 + 16 * i);
            spread_bytes<4>(high, b + 66 + 4 * i);
            leave(p.index + 16 * i, low | (high * bits & 0x300));
        }
    }

    template <class Put>
    FN void codes(const uint8_t* b, const Prepared& p, Put&& put) {
#pragma GCC unroll 16
        for (int c = 0; c < VECTORS; ++c) {
            const int i = c * LANES / 2;
            auto row = [&](int j) __attribute__((always_inline)) { return grid_IQ2_S.row[p.index[i + j]]; };
            put(c, negated(of_eights(row), 2 * zero, b + 34 + i));
        }
    }
};

struct IQ3_XXS : FewBits<18, 98, IQ3_XXS_ZERO, 8> {
    static constexpr float d_unit = 0.25f;

    FN void prepare(const uint8_t* b, Prepared& p) {
        Words8 w;
        fetch(w, b + 66);
        leave_odd(p.scales, w >> 28);
        eighth_signs(w);
        leave(p.bits, w);
    }

    template <class Put>
    FN void codes(const uint8_t* b, const Prepared& p, Put&& put) {
#pragma GCC unroll 16
        for (int c = 0; c < VECTORS; ++c) {
            auto row = [&](int j) __attribute__((always_inline)) {
                return grid_IQ3_XXS.row + b[2 + c * LANES + j] + 1;
            };
            put(c, negated(of_fours(row), 2 * zero, p.bits + c * LANES / 2));
        }
    }
};

struct IQ3_S : FewBits<21, 110, IQ3_S_ZERO, 8> {
    FN void prepare(const uint8_t* b, Prepared& p) {
        uint32_t s;
        memcpy(&s, b + 106, 4);
        constexpr Words8 shifts = {0, 4, 8, 12, 16, 20, 24, 28};
        leave_odd(p.scales, (Words8{s, s, s, s, s, s, s, s} >> shifts) & 15);
        constexpr Halves16 bits = {256, 128, 64, 32, 16, 8, 4, 2, 256, 128, 64, 32, 16, 8, 4, 2};
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            Halves16 low, high;
            widen(low, b + 2 + 16 * i);
            spread_bytes<8>(high, b + 66 + 2 * i);
            leave(p.index + 16 * i, low | (high * bits & 256));
        }
    }

    template <class Put>
    FN void codes(const uint8_t* b, const Prepared& p, Put&& put) {
#pragma GCC unroll 16
        for (int c = 0; c < VECTORS; ++c) {
            auto row = [&](int j) __attribute__((always_inline)) {
                return grid_IQ3_S.row + p.index[c * LANES + j] + 1;
            };
            put(c, negated(of_fours(row), 2 * zero, b + 74 + c * LANES / 2));
        }
    }
};

// Rows of IQ1's grid, which has 1 more, less 0 or 2.
template <class Put>
FN void put_less(const Prepared& p, Put&& put) {
    U which;  // byte i / 8 of a row's place
#pragma GCC unroll 16
    for (int j = 0; j < LANES; ++j) which[j] = j / 2 * 0x01010101u;
#pragma GCC unroll 16
    for (int c = 0; c < VECTORS; ++c) {
        const int i = c * LANES / 2;
        auto row = [&](int j) __attribute__((always_inline)) { return grid_IQ1.row[p.index[i + j]]; };
        auto eight = [&](int) __attribute__((always_inline)) { return eight_at(p.bits + i); };
        put(c, (U)((Bytes)of_eights(row) - (Bytes)look_up(of_eights(eight), which)));
    }
}

struct IQ1_S : FewBits<19, 50, IQ1_ZERO, 8> {
    static constexpr float d_unit = 0.125f;

    FN void prepare(const uint8_t* b, Prepared& p) {
        Halves8 h;
        fetch(h, b + 34);
        leave_odd(p.scales, __builtin_convertvector(h >> 12 & 7, Words8));
        constexpr Halves16 left = {256, 32, 4, 0, 256, 32, 4, 0, 256, 32, 4, 0, 256, 32, 4, 0},
                           right = {0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1};
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
            Halves16 low, four;
            widen(low, b + 2 + 16 * i);
            four = i ? __builtin_shufflevector(h, h, 4, 4, 4, 4, 5, 5, 5, 5, 6, 6, 6, 6, 7, 7, 7, 7)
                     : __builtin_shufflevector(h, h, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
            leave(p.index + 16 * i, low | ((four * left | (four >> 1) * right) & 0x700));
            leave(p.bits + 16 * i, __builtin_convertvector(four >> 14 & 2, Bytes16));
        }
    }

    template <class Put>
    FN void codes(const uint8_t*, const Prepared& p, Put&& put) {
        put_less(p, put);
    }
};

struct IQ1_M : FewBits<29, 56, IQ1_ZERO, 16> {
    static constexpr float d_unit = 0.125f;

    FN uint32_t d(const uint8_t* b, int) {  // the highest nibbles of the words of scales
        const uint64_t s = eight_at(b + 48) >> 12 & 0x000f000f000f000f;
        return (uint16_t)(s | s >> 12 | s >> 24 | s >> 36);
    }

    FN void prepare(const uint8_t* b, Prepared& p) {
        const uint64_t s = eight_at(b + 48);
        typedef uint64_t Same __attribute__((vector_size(32)));
        constexpr Halves16 up = {512, 64, 8, 1, 512, 64, 8, 1, 512, 64, 8, 1, 512, 64, 8, 1};
        Halves16 w = (Halves16)Same{s, s, s, s};
        w = __builtin_shufflevector(w, w, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
        leave(p.scales, (w * up >> 8 & 14) + 1);
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
            Halves16 low;
            widen(low, b + 16 * i);
            Words8 two;  // nibbles
            widen(two, b + 32 + 8 * i);
            const Halves16 high = (Halves16)((two << 8 & 0xf00) | (two << 20 & 0xf000000));
            leave(p.index + 16 * i, low | (high & 0x700));
            leave(p.bits + 16 * i, __builtin_convertvector(high >> 10 & 2, Bytes16));
        }
    }

    template <class Put>
    FN void codes(const uint8_t*, const Prepared& p, Put&& put) {
        put_less(p, put);
    }
};

}  // namespace isobit::ISOBIT_SIMD
