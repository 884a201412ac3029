// Unpacks LANES weight rows at a time: codes, sub-scales and mins with the rows side by side in a
// vector's lanes. Layouts: isobit/gguf/formats.py.
//
// A format of 256-value blocks gives the scales and mins of a superblock, then puts its codes
// one vector after the other: put(j, v), where v holds values 4j .. 4j+3 of the superblock and each
// group's come in ascending order. A format of 32-value blocks unpacks one block.
#pragma once

namespace isobit::ISOBIT_SIMD {

// Codes are unsigned, Format::zero too large. Sub-scales and mins are bytes, four groups in a lane;
// sub-scales are signed where codes have a zero point.
struct Scales {
    F d, dmin;
    U scales[4], mins[4];
};

struct Block32 {
    F d, dmin;
    U codes[8];
};

typedef const uint8_t* const* Rows;

FN U gather4(Rows rows, size_t offset) {
    U v;
#pragma GCC unroll 16
    for (int r = 0; r < LANES; ++r) {
        uint32_t x;
        memcpy(&x, rows[r] + offset, 4);
        v[r] = x;
    }
    return v;
}

FN U gather2(Rows rows, size_t offset) {
    U v;
#pragma GCC unroll 16
    for (int r = 0; r < LANES; ++r) {
        uint16_t x;
        memcpy(&x, rows[r] + offset, 2);
        v[r] = x;
    }
    return v;
}

constexpr uint32_t LOW4 = 0x0f0f0f0f, LOW2 = 0x03030303, HIGH2 = 0x30303030, BIT = 0x01010101,
                   SIGNS = 0x80808080;

// d, dmin and the eight 6-bit scales and mins with which Q4_K and Q5_K begin.
FN void unpack_scales6(Rows rows, Scales& w) {
    U h[4];
    gather16(rows, 0, h);
    w.d = half_to_float(h[0]);
    w.dmin = half_to_float(h[0] >> 16);
    w.scales[0] = h[1] & 0x3f3f3f3f;
    w.scales[1] = (h[3] & LOW4) | (h[1] >> 2 & HIGH2);
    w.mins[0] = h[2] & 0x3f3f3f3f;
    w.mins[1] = (h[3] >> 4 & LOW4) | (h[2] >> 2 & HIGH2);
}

struct Q4_K {
    static constexpr int block = 256, bytes = 144, group = 32, largest = 15, zero = 0;
    static constexpr bool mins = true;

    FN void scales(Rows rows, Scales& w) { unpack_scales6(rows, w); }

    template <class Put>
    FN void codes(Rows rows, Put&& put) {
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
            U q[4];
            gather16(rows, 16 + 16 * i, q);
            const int at = i / 2 * 16 + i % 2 * 4;
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j) {
                put(at + j, q[j] & LOW4);
                put(at + j + 8, q[j] >> 4 & LOW4);
            }
        }
    }
};

struct Q5_K {
    static constexpr int block = 256, bytes = 176, group = 32, largest = 31, zero = 0;
    static constexpr bool mins = true;

    FN void scales(Rows rows, Scales& w) { unpack_scales6(rows, w); }

    template <class Put>
    FN void codes(Rows rows, Put&& put) {
        U high[8];
        gather16(rows, 16, high);
        gather16(rows, 32, high + 4);
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
            U q[4];
            gather16(rows, 48 + 16 * i, q);
            const int at = i / 2 * 16 + i % 2 * 4;
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j) {
                U h = high[i % 2 * 4 + j] >> i / 2 * 2;
                put(at + j, (q[j] & LOW4) | (h & BIT) << 4);
                put(at + j + 8, (q[j] >> 4 & LOW4) | (h >> 1 & BIT) << 4);
            }
        }
    }
};

struct Q6_K {
    static constexpr int block = 256, bytes = 210, group = 16, largest = 63, zero = 32;
    static constexpr bool mins = false;

    FN void scales(Rows rows, Scales& w) {
        gather16(rows, 192, w.scales);
        w.d = half_to_float(gather2(rows, 208));
    }

    template <class Put>
    FN void codes(Rows rows, Put&& put) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {  // half i / 2, bytes 16 * (i % 2) of its 32-byte runs
            U a[4], b[4], high[4];
            gather16(rows, i / 2 * 64 + i % 2 * 16, a);
            gather16(rows, i / 2 * 64 + i % 2 * 16 + 32, b);
            gather16(rows, 128 + 16 * i, high);
            const int at = i / 2 * 32 + i % 2 * 4;
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j) {
                put(at + j, (a[j] & LOW4) | (high[j] << 4 & HIGH2));
                put(at + j + 8, (b[j] & LOW4) | (high[j] << 2 & HIGH2));
                put(at + j + 16, (a[j] >> 4 & LOW4) | (high[j] & HIGH2));
                put(at + j + 24, (b[j] >> 4 & LOW4) | (high[j] >> 2 & HIGH2));
            }
        }
    }
};

struct Q3_K {
    static constexpr int block = 256, bytes = 110, group = 16, largest = 7, zero = 4;
    static constexpr bool mins = false;

    FN void scales(Rows rows, Scales& w) {
        U s[4];  // two bytes of codes, the 12 of scales, d
        gather16(rows, 94, s);
        w.d = half_to_float(s[3] >> 16);
        U low[2] = {s[0] >> 16 | s[1] << 16, s[1] >> 16 | s[2] << 16};
        U high = s[2] >> 16 | s[3] << 16;
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            U x = (low[i % 2] >> i / 2 * 4 & LOW4) | (high >> 2 * i & LOW2) << 4;
            w.scales[i] = ((x | SIGNS) - (SIGNS >> 2)) ^ SIGNS;  // 32 from each byte
        }
    }

    template <class Put>
    FN void codes(Rows rows, Put&& put) {
        U mask[8];
        gather16(rows, 0, mask);
        gather16(rows, 16, mask + 4);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            U q[4];
            gather16(rows, 32 + 16 * i, q);
            const int at = i / 2 * 32 + i % 2 * 4;
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j)
#pragma GCC unroll 4
                for (int k = 0; k < 4; ++k)
                    put(at + j + 8 * k, (q[j] >> 2 * k & LOW2) |
                                            (mask[i % 2 * 4 + j] >> (i / 2 * 4 + k) & BIT) << 2);
        }
    }
};

struct Q2_K {
    static constexpr int block = 256, bytes = 84, group = 16, largest = 3, zero = 0;
    static constexpr bool mins = true;

    FN void scales(Rows rows, Scales& w) {
        U s[4];
        gather16(rows, 0, s);
        U d = gather4(rows, 80);
        w.d = half_to_float(d);
        w.dmin = half_to_float(d >> 16);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) w.scales[i] = s[i] & LOW4, w.mins[i] = s[i] >> 4 & LOW4;
    }

    template <class Put>
    FN void codes(Rows rows, Put&& put) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            U q[4];
            gather16(rows, 16 + 16 * i, q);
            const int at = i / 2 * 32 + i % 2 * 4;
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j)
#pragma GCC unroll 4
                for (int k = 0; k < 4; ++k) put(at + j + 8 * k, q[j] >> 2 * k & LOW2);
        }
    }
};

// Blocks of 32 values.

FN void unpack_nibbles(Rows rows, size_t offset, U* codes) {
    U q[4];
    gather16(rows, offset, q);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
        codes[j] = q[j] & LOW4;
        codes[j + 4] = q[j] >> 4 & LOW4;
    }
}

// Bit k of the four bytes at offset becomes bit 4 of code k.
FN void add_fifth_bits(Rows rows, size_t offset, U* codes) {
    U bits = gather4(rows, offset);
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
        U b = bits >> 4 * j;  // four bits to four bytes
        codes[j] |= ((b & 1) | (b & 2) << 7 | (b & 4) << 14 | (b & 8) << 21) << 4;
    }
}

struct Q4_0 {
    static constexpr int block = 32, bytes = 18, group = 32, largest = 15, zero = 8;
    static constexpr bool mins = false;

    FN void unpack(Rows rows, Block32& w) {
        w.d = half_to_float(gather2(rows, 0));
        unpack_nibbles(rows, 2, w.codes);
    }
};

struct Q4_1 {
    static constexpr int block = 32, bytes = 20, group = 32, largest = 15, zero = 0;
    static constexpr bool mins = true;

    FN void unpack(Rows rows, Block32& w) {
        U h = gather4(rows, 0);
        w.d = half_to_float(h);
        w.dmin = -half_to_float(h >> 16);
        unpack_nibbles(rows, 4, w.codes);
    }
};

struct Q5_0 {
    static constexpr int block = 32, bytes = 22, group = 32, largest = 31, zero = 16;
    static constexpr bool mins = false;

    FN void unpack(Rows rows, Block32& w) {
        w.d = half_to_float(gather2(rows, 0));
        unpack_nibbles(rows, 6, w.codes);
        add_fifth_bits(rows, 2, w.codes);
    }
};

struct Q5_1 {
    static constexpr int block = 32, bytes = 24, group = 32, largest = 31, zero = 0;
    static constexpr bool mins = true;

    FN void unpack(Rows rows, Block32& w) {
        U h = gather4(rows, 0);
        w.d = half_to_float(h);
        w.dmin = -half_to_float(h >> 16);
        unpack_nibbles(rows, 8, w.codes);
        add_fifth_bits(rows, 4, w.codes);
    }
};

struct Q8_0 {
    static constexpr int block = 32, bytes = 34, group = 32, largest = 255, zero = ZERO8;
    static constexpr bool mins = false;

    FN void unpack(Rows rows, Block32& w) {
        w.d = half_to_float(gather2(rows, 0));
        gather16(rows, 2, w.codes);
        gather16(rows, 18, w.codes + 4);
#pragma GCC unroll 8
        for (int j = 0; j < 8; ++j) w.codes[j] = code8(w.codes[j]);
    }
};

}  // namespace isobit::ISOBIT_SIMD
