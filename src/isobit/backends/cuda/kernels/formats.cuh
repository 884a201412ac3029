// The block formats of GGUF as they lie in a file: four codes at a time, and the scales.
// The same fields as isobit.gguf.blocks. Blocks lie at even addresses, no better (MXFP4: at any).
#pragma once
#include "common.cuh"

DEV int load16(const uint8* p) { return *reinterpret_cast<const uint16*>(p); }
DEV int load32(const uint8* p) { return load16(p) | load16(p + 2) << 16; }
DEV float load_half(const uint8* p) { return half_to_float(uint16(load16(p))); }

// Subtract a power of two from four bytes below 128; the results are signed bytes.
template <int ZERO>
DEV int minus(int v) {
    constexpr int byte = 128 - ZERO;
    return (v + byte * 0x01010101) ^ int(0x80808080);
}
// Bits 0 … 3 of v to the lowest bit of each of four bytes.
DEV int spread_bits(int v) { return ((v & 15) * 0x00204081) & 0x01010101; }

// Four-bit indices in four bytes to the bytes of a table of 16. A byte permutation picks from 8.
DEV int look_up(int t0, int t1, int t2, int t3, int indices) {
    uint32 picks = (indices | indices >> 4) & 0x00ff00ff;
    picks = (picks | picks >> 8) & 0xffff;
    uint32 low = __byte_perm(t0, t1, picks & 0x7777), high = __byte_perm(t2, t3, picks & 0x7777);
    return __byte_perm(low, high, 0x3210 | (picks & 0x8888) >> 1);
}
DEV int iq4_codes(int indices) {
    return look_up(0xbfad9881, 0xf6eaddcf, 0x26190d01, 0x71594535, indices);
}
DEV int fp4_codes(int indices) {
    return look_up(0x03020100, 0x0c080604, 0xfdfeff00, 0xf4f8fafc, indices);
}
// 2^(e - 128); for e < 2 a subnormal.
DEV float power_of_two(int e) { return isobit::from_bits(e < 2 ? 1u << (21 + e) : uint32(e - 1) << 23); }

// A block of 32 values with a float scale, and a float minimum (-dmin) if MINS.
template <int CODES_AT, bool MINS>
struct Plain {
    static constexpr int SIZE = 32, GROUP = 32;
    static constexpr bool HAS_MINS = MINS;
    const uint8* b;
    DEV int scale(int) const { return 1; }
    DEV int min(int) const { return 1; }
    DEV float d() const { return load_half(b); }
    DEV float dmin() const { return MINS ? -load_half(b + 2) : 0.0f; }
    DEV int nibbles(int k) const {
        return load32(b + CODES_AT + k % 16) >> k / 16 * 4 & 0x0f0f0f0f;
    }
    DEV int fifth(int k) const { return spread_bits(load32(b + CODES_AT - 4) >> k) << 4; }
};
struct Q8_0 : Plain<2, false> {
    static constexpr int BYTES = 34;
    DEV int codes(int k) const { return load32(b + 2 + k); }
};
struct Q4_0 : Plain<2, false> {
    static constexpr int BYTES = 18;
    DEV int codes(int k) const { return minus<8>(nibbles(k)); }
};
struct Q4_1 : Plain<4, true> {
    static constexpr int BYTES = 20;
    DEV int codes(int k) const { return nibbles(k); }
};
struct Q5_0 : Plain<6, false> {
    static constexpr int BYTES = 22;
    DEV int codes(int k) const { return minus<16>(nibbles(k) | fifth(k)); }
};
struct Q5_1 : Plain<8, true> {
    static constexpr int BYTES = 24;
    DEV int codes(int k) const { return nibbles(k) | fifth(k); }
};

struct IQ4_NL : Plain<2, false> {
    static constexpr int BYTES = 18;
    DEV int codes(int k) const { return iq4_codes(nibbles(k)); }
};
struct MXFP4 : Plain<1, false> {
    static constexpr int BYTES = 17;
    DEV float d() const { return power_of_two(b[0]); }
    DEV int codes(int k) const {
        const uint8* p = b + 1 + k % 16;
        int four = p[0] | p[1] << 8 | p[2] << 16 | p[3] << 24;
        return fp4_codes(four >> k / 16 * 4 & 0x0f0f0f0f);
    }
};

struct Q2_K {
    static constexpr int SIZE = 256, GROUP = 16, BYTES = 84;
    static constexpr bool HAS_MINS = true;
    const uint8* b;
    DEV int codes(int k) const {
        return load32(b + 16 + k / 128 * 32 + k % 32) >> k % 128 / 32 * 2 & 0x03030303;
    }
    DEV int scale(int g) const { return b[g] & 15; }
    DEV int min(int g) const { return b[g] >> 4; }
    DEV float d() const { return load_half(b + 80); }
    DEV float dmin() const { return load_half(b + 82); }
};

struct Q3_K {
    static constexpr int SIZE = 256, GROUP = 16, BYTES = 110;
    static constexpr bool HAS_MINS = false;
    const uint8* b;
    DEV int codes(int k) const {
        int low = load32(b + 32 + k / 128 * 32 + k % 32) >> k % 128 / 32 * 2 & 0x03030303;
        int top = load32(b + k % 32) >> k / 32 & 0x01010101;
        return minus<4>(low | top << 2);
    }
    DEV int scale(int g) const {
        int low = b[96 + g % 8] >> g / 8 * 4 & 15, top = b[104 + g % 4] >> g / 4 * 2 & 3;
        return (low | top << 4) - 32;
    }
    DEV int min(int) const { return 0; }
    DEV float d() const { return load_half(b + 108); }
    DEV float dmin() const { return 0.0f; }
};

// Q4_K and Q5_K: eight 6-bit scales and mins in 12 bytes after d and dmin.
struct SixBit {
    static constexpr int SIZE = 256, GROUP = 32;
    static constexpr bool HAS_MINS = true;
    const uint8* b;
    DEV int scale(int g) const {
        return g < 4 ? b[4 + g] & 63 : (b[8 + g] & 15) | (b[g] >> 6) << 4;
    }
    DEV int min(int g) const {
        return g < 4 ? b[8 + g] & 63 : b[8 + g] >> 4 | (b[4 + g] >> 6) << 4;
    }
    DEV float d() const { return load_half(b); }
    DEV float dmin() const { return load_half(b + 2); }
};
struct Q4_K : SixBit {
    static constexpr int BYTES = 144;
    DEV int codes(int k) const {
        return load32(b + 16 + k / 64 * 32 + k % 32) >> k % 64 / 32 * 4 & 0x0f0f0f0f;
    }
};
struct Q5_K : SixBit {
    static constexpr int BYTES = 176;
    DEV int codes(int k) const {
        int low = load32(b + 48 + k / 64 * 32 + k % 32) >> k % 64 / 32 * 4 & 0x0f0f0f0f;
        return low | (load32(b + 16 + k % 32) >> k / 32 & 0x01010101) << 4;
    }
};
struct Q6_K {
    static constexpr int SIZE = 256, GROUP = 16, BYTES = 210;
    static constexpr bool HAS_MINS = false;
    const uint8* b;
    DEV int codes(int k) const {
        int low = load32(b + k / 128 * 64 + k % 64) >> k % 128 / 64 * 4 & 0x0f0f0f0f;
        int top = load32(b + 128 + k / 128 * 32 + k % 32) >> k % 128 / 32 * 2 & 0x03030303;
        return minus<32>(low | top << 4);
    }
    DEV int scale(int g) const { return int8(b[192 + g]); }
    DEV int min(int) const { return 0; }
    DEV float d() const { return load_half(b + 208); }
    DEV float dmin() const { return 0.0f; }
};
struct IQ4_XS {
    static constexpr int SIZE = 256, GROUP = 32, BYTES = 136;
    static constexpr bool HAS_MINS = false;
    const uint8* b;
    DEV int codes(int k) const {
        return iq4_codes(load32(b + 8 + k / 32 * 16 + k % 16) >> k % 32 / 16 * 4 & 0x0f0f0f0f);
    }
    DEV int scale(int g) const {
        return ((b[4 + g / 2] >> g % 2 * 4 & 15) | (load16(b + 2) >> 2 * g & 3) << 4) - 32;
    }
    DEV int min(int) const { return 0; }
    DEV float d() const { return load_half(b); }
    DEV float dmin() const { return 0.0f; }
};

// One value as isobit.gguf.formats.dequantize rounds it: (d * scale) * code - dmin * min.
template <class F>
DEV float dequantised(const F& block, int k) {
    int code = int8(block.codes(k & ~3) >> k % 4 * 8), g = k / F::GROUP;
    float v = mul(mul(block.d(), float(block.scale(g))), float(code));
    return F::HAS_MINS ? sub(v, mul(block.dmin(), float(block.min(g)))) : v;
}

// Plain floats: F32, F16, BF16 by their size and kind.
enum FloatKind { KIND_F32, KIND_F16, KIND_BF16 };
DEV float load_float(const void* p, int64 i, int kind) {
    if (kind == KIND_F32) return static_cast<const float*>(p)[i];
    uint16 h = static_cast<const uint16*>(p)[i];
    return kind == KIND_F16 ? half_to_float(h) : isobit::from_bits(uint32(h) << 16);
}
