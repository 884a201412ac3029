// Formats of one to three bits, and NVFP4: as formats.cuh, for products and rows from the file's bytes.
//
// A row of a grid is 16 bits: eight codes of two, or four of four.
#pragma once
#include "formats.cuh"

#define GRID(name, width, values, ...) static __device__ const uint16 name##_ROWS[] = {__VA_ARGS__};
#include "grids.h"
#undef GRID

// Bits 0 … 7, two for each byte; bits 0 … 15, four for each byte.
DEV int spread_pairs(int v) {
    v &= 255;
    return (v | v << 6 | v << 12 | v << 18) & 0x03030303;
}
DEV int spread_nibbles(int v) {
    return (v & 15) | (v & 0xf0) << 4 | (v & 0xf00) << 8 | (v & 0xf000) << 12;
}
// Codes above 0; those negated whose bit is set.
DEV int with_signs(int codes, int signs) {
    int ones = spread_bits(signs);
    return (codes ^ ones * 255) + ones;
}
// Seven sign bits, and the eighth that makes their number even.
DEV int eight_signs(int seven) { return seven | (__popc(seven) & 1) << 7; }

// Of codes k % 8 … k % 8 + 3 of a row.
DEV int iq1_codes(int row, int k, bool negative) {
    return minus<16>((spread_pairs(row >> k % 8 * 2) << 3) + (negative ? 0x07070707 : 0x09090909));
}
DEV int iq2_codes(int row, int k, int signs) {  // 8, 25 or 43
    int i = spread_pairs(row >> k % 8 * 2);
    return with_signs(0x08080808 + 17 * i + (i >> 1 & 0x01010101), signs >> k % 8);
}
// Of all codes of a row.
DEV int iq3_xxs_codes(int row, int signs) {  // 4, 12 … 52, 62
    int i = spread_nibbles(row);
    return with_signs(0x04040404 + 8 * i + 2 * (i & i >> 1 & i >> 2 & 0x01010101), signs);
}
DEV int iq3_s_codes(int row, int signs) {  // 1, 3 … 15
    return with_signs(0x01010101 + 2 * spread_nibbles(row), signs);
}

// One d, without mins.
template <int SIZE_, int BYTES_, int GROUP_ = SIZE_>
struct OneScale {
    static constexpr int SIZE = SIZE_, BYTES = BYTES_, GROUP = GROUP_;
    static constexpr bool HAS_MINS = false;
    const uint8* b;
    DEV int scale(int) const { return 1; }
    DEV int min(int) const { return 0; }
    DEV float d() const { return load_half(b); }
    DEV float dmin() const { return 0.0f; }
    DEV int odd_scale(int at, int g) const { return 2 * (b[at + g / 2] >> g % 2 * 4 & 15) + 1; }
};

struct IQ1_S : OneScale<256, 50, 32> {
    DEV int high(int g) const { return load16(b + 34 + 2 * g); }
    DEV int codes(int k) const {
        int h = high(k / 32);
        return iq1_codes(IQ1_ROWS[b[2 + k / 8] | (h >> k / 8 % 4 * 3 & 7) << 8], k, h >> 15);
    }
    DEV int scale(int g) const { return 2 * (high(g) >> 12 & 7) + 1; }
    DEV float d() const { return mul(load_half(b), 0.125f); }
};
struct IQ1_M : OneScale<256, 56, 16> {
    DEV int codes(int k) const {
        int h = b[32 + k / 16] >> k / 8 % 2 * 4;
        return iq1_codes(IQ1_ROWS[b[k / 8] | (h & 7) << 8], k, h & 8);
    }
    DEV int scale(int g) const { return 2 * (load16(b + 48 + g / 4 * 2) >> g % 4 * 3 & 7) + 1; }
    DEV float d() const {
        int low = b[49] >> 4 | (b[51] & 0xf0), high = b[53] >> 4 | (b[55] & 0xf0);
        return mul(half_to_float(uint16(low | high << 8)), 0.125f);
    }
};
struct IQ2_XXS : OneScale<256, 66, 32> {
    DEV int codes(int k) const {
        const uint8* p = b + 2 + k / 32 * 8;
        int i = k / 8 % 4;
        return iq2_codes(IQ2_XXS_ROWS[p[i]], k, eight_signs(load32(p + 4) >> 7 * i & 127));
    }
    DEV int scale(int g) const { return 2 * (b[9 + 8 * g] >> 4) + 1; }
    DEV float d() const { return mul(load_half(b), 0.125f); }
};
struct IQ2_XS : OneScale<256, 74, 16> {
    DEV int codes(int k) const {
        int q = load16(b + 2 + k / 8 * 2);
        return iq2_codes(IQ2_XS_ROWS[q & 511], k, eight_signs(q >> 9));
    }
    DEV int scale(int g) const { return odd_scale(66, g); }
    DEV float d() const { return mul(load_half(b), 0.125f); }
};
struct IQ2_S : OneScale<256, 82, 16> {
    DEV int codes(int k) const {
        int high = b[66 + k / 32] >> k / 8 % 4 * 2 & 3;
        return iq2_codes(IQ2_S_ROWS[b[2 + k / 8] | high << 8], k, b[34 + k / 8]);
    }
    DEV int scale(int g) const { return odd_scale(74, g); }
    DEV float d() const { return mul(load_half(b), 0.125f); }
};
struct IQ3_XXS : OneScale<256, 98, 32> {
    DEV int codes(int k) const {
        int seven = load32(b + 66 + k / 32 * 4) >> k / 8 % 4 * 7 & 127;
        return iq3_xxs_codes(IQ3_XXS_ROWS[b[2 + k / 4]], eight_signs(seven) >> k % 8);
    }
    DEV int scale(int g) const { return 2 * (b[69 + 4 * g] >> 4) + 1; }
    DEV float d() const { return mul(load_half(b), 0.25f); }
};
struct IQ3_S : OneScale<256, 110, 32> {
    DEV int codes(int k) const {
        int high = b[66 + k / 32] >> k / 4 % 8 & 1;
        return iq3_s_codes(IQ3_S_ROWS[b[2 + k / 4] | high << 8], b[74 + k / 8] >> k % 8);
    }
    DEV int scale(int g) const { return odd_scale(106, g); }
};

struct TQ1_0 : OneScale<256, 54> {
    // Digits of bytes that are 256 * x / 243, of 0 to 2, highest first.
    DEV int codes(int k) const {
        int at = k < 160 ? k % 32 : k < 240 ? 32 + k % 16 : 48;
        int n = k < 160 ? k / 32 : k < 240 ? (k - 160) / 16 : (k - 240) / 4;
        int power = n == 0 ? 1 : n == 1 ? 3 : n == 2 ? 9 : n == 3 ? 27 : 81, q = load32(b + at);
        uint32 even = (q & 0x00ff00ff) * power & 0x00ff00ff;
        uint32 odd = (q >> 8 & 0x00ff00ff) * power & 0x00ff00ff;
        return minus<1>((even * 3 >> 8 & 0x00ff00ff) | (odd * 3 & 0xff00ff00));
    }
    DEV float d() const { return load_half(b + 52); }
};
struct TQ2_0 : OneScale<256, 66> {
    DEV int codes(int k) const {
        return minus<1>(load32(b + k / 128 * 32 + k % 32) >> k % 128 / 32 * 2 & 0x03030303);
    }
    DEV float d() const { return load_half(b + 64); }
};
struct Q1_0 : OneScale<128, 18> {
    DEV int codes(int k) const { return minus<1>(spread_bits(b[2 + k / 8] >> k % 8) << 1); }
};
struct Q2_0 : OneScale<64, 18> {
    DEV int codes(int k) const { return minus<1>(spread_pairs(b[2 + k / 4])); }
};

// Four blocks of 16 values: their scales, then their codes.
struct NVFP4 : OneScale<16, 36> {
    int part;
    DEV int codes(int k) const {
        return fp4_codes(load32(b + 4 + 8 * part + k % 8) >> k / 8 * 4 & 0x0f0f0f0f);
    }
    // Half of what a byte of four exponent and three mantissa bits stands for, without its sign;
    // 0x7F alone for 0.
    DEV float d() const {
        int v = b[part] & 127, e = v >> 3;
        float power = isobit::from_bits(uint32(max(e, 1) + 116) << 23);  // 2^(e - 11)
        return b[part] == 127 ? 0.0f : mul(float(v % 8 + (e ? 8 : 0)), power);
    }
};

// A block of a row, or of a matrix whose rows follow one another.
template <class F>
constexpr int PARTS = 1;
template <>
constexpr int PARTS<NVFP4> = 4;
template <class F>
DEV F block_at(const uint8* blocks, int64 i) {
    F w;
    w.b = blocks + i / PARTS<F> * F::BYTES;
    if constexpr (PARTS<F> > 1) w.part = i % PARTS<F>;
    return w;
}
