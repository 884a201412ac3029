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
    auto four = [&](int j) __attribute__((always_inline)) {
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
