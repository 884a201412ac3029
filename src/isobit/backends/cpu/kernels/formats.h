// Unpacks LANES weight rows at a time: codes, sub-scales and mins with the rows side by side in a
// vector's lanes. Layouts: isobit/gguf/formats.py.
//
// A format of 256-value blocks gives the scales and mins of a superblock, then puts its codes
// one vector after the other: put(j, v), where v holds values 4j .. 4j+3 of the superblock and each
// group's come in ascending order. A format of smaller blocks unpacks one block.
#pragma once

namespace isobit::ISOBIT_SIMD {

// Codes are unsigned, Format::zero too large; those with largest = 255 are what wide_code() makes of
// signed bytes. Sub-scales and mins are bytes, four groups in a lane.
struct Scales {
    F d, dmin;
    U scales[4], mins[4];
};

template <class Format>
struct Block {
    F d, dmin;
    U codes[Format::block / 4];
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
    static constexpr int id = 12, block = 256, bytes = 144, group = 32, largest = 15, zero = 0;
    static constexpr bool mins = true, signed_scales = false;

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
    static constexpr int id = 13, block = 256, bytes = 176, group = 32, largest = 31, zero = 0;
    static constexpr bool mins = true, signed_scales = false;

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
    static constexpr int id = 14, block = 256, bytes = 210, group = 16, largest = 63, zero = 32;
    static constexpr bool mins = false, signed_scales = true;

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
    static constexpr int id = 11, block = 256, bytes = 110, group = 16, largest = 7, zero = 4;
    static constexpr bool mins = false, signed_scales = true;

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
    static constexpr int id = 10, block = 256, bytes = 84, group = 16, largest = 3, zero = 0;
    static constexpr bool mins = true, signed_scales = false;

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

// Sixteen bytes for look_up(), in each 16 bytes of the vector.
FN U table16(const int8_t* bytes) {
    U v;
#pragma GCC unroll 16
    for (int r = 0; r < LANES; ++r) {
        uint32_t x;
        memcpy(&x, bytes + r % 4 * 4, 4);
        v[r] = x;
    }
    return v;
}

// Codes of four bits that stand for signed bytes.
constexpr int8_t IQ4_CODES[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                  1,    13,   25,  38,  53,  69,  89,  113};
FN U iq4_codes() { return wide_code(table16(IQ4_CODES)); }

struct IQ4_XS {
    static constexpr int id = 23, block = 256, bytes = 136, group = 32, largest = 255,
                         zero = WIDE_ZERO;
    static constexpr bool mins = false, signed_scales = true;

    FN void scales(Rows rows, Scales& w) {
        U d = gather4(rows, 0), low = gather4(rows, 4);  // d and the top bit pairs; the low nibbles
        w.d = half_to_float(d);
        U even = low & LOW4, odd = low >> 4 & LOW4;  // of groups 0 2 4 6 and 1 3 5 7
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
            U e = even >> 16 * i, o = odd >> 16 * i, top = d >> (16 + 8 * i);
            U x = (e & 0xff) | (o & 0xff) << 8 | (e & 0xff00) << 8 | (o & 0xff00) << 16;
            x |= (top & 3) << 4 | (top & 12) << 10 | (top & 48) << 16 | (top & 192) << 22;
            w.scales[i] = ((x | SIGNS) - (SIGNS >> 2)) ^ SIGNS;  // 32 from each byte
        }
    }

    template <class Put>
    FN void codes(Rows rows, Put&& put) {
        const U table = iq4_codes();
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
            U q[4];
            gather16(rows, 8 + 16 * i, q);
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j) put(8 * i + j, look_up(table, q[j] & LOW4));
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j) put(8 * i + j + 4, look_up(table, q[j] >> 4 & LOW4));
        }
    }
};

// Blocks of smaller formats lie in words that hold a stretch of each row, as gather16 gives them; this
// one from byte `start` on.
struct InWords {
    const U* words;
    int start;
    INLINE U byte(int at) const { return part(at) & 0xff; }
    INLINE U half(int at) const { return part(at); }  // the upper half of the lane is not specified
    INLINE U word(int at) const {
        const int shift = (start + at) % 4 * 8;
        return shift ? part(at) | words[(start + at) / 4 + 1] << (32 - shift) : part(at);
    }
    INLINE void words4(int at, U* out) const {
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) out[j] = word(at + 4 * j);
    }

private:
    INLINE U part(int at) const { return words[(start + at) / 4] >> (start + at) % 4 * 8; }
};

// Blocks of 32 values.

FN void unpack_nibbles(InWords b, int at, U* codes) {
    U q[4];
    b.words4(at, q);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
        codes[j] = q[j] & LOW4;
        codes[j + 4] = q[j] >> 4 & LOW4;
    }
}

FN void unpack_table(InWords b, int at, U table, U* codes) {
    unpack_nibbles(b, at, codes);
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) codes[j] = look_up(table, codes[j]);
}

// Bit k of the four bytes becomes bit 4 of code k.
FN void add_fifth_bits(InWords b, int at, U* codes) {
    U bits = b.word(at);
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
        U x = bits >> 4 * j;  // four bits to four bytes
        codes[j] |= ((x & 1) | (x & 2) << 7 | (x & 4) << 14 | (x & 8) << 21) << 4;
    }
}

struct Q4_0 {
    static constexpr int id = 2, block = 32, bytes = 18, group = 32, largest = 15, zero = 8;
    static constexpr bool mins = false;

    FN void unpack(InWords b, Block<Q4_0>& w) {
        w.d = half_to_float(b.half(0));
        unpack_nibbles(b, 2, w.codes);
    }
};

struct Q4_1 {
    static constexpr int id = 3, block = 32, bytes = 20, group = 32, largest = 15, zero = 0;
    static constexpr bool mins = true;

    FN void unpack(InWords b, Block<Q4_1>& w) {
        U h = b.word(0);
        w.d = half_to_float(h);
        w.dmin = -half_to_float(h >> 16);
        unpack_nibbles(b, 4, w.codes);
    }
};

struct Q5_0 {
    static constexpr int id = 6, block = 32, bytes = 22, group = 32, largest = 31, zero = 16;
    static constexpr bool mins = false;

    FN void unpack(InWords b, Block<Q5_0>& w) {
        w.d = half_to_float(b.half(0));
        unpack_nibbles(b, 6, w.codes);
        add_fifth_bits(b, 2, w.codes);
    }
};

struct Q5_1 {
    static constexpr int id = 7, block = 32, bytes = 24, group = 32, largest = 31, zero = 0;
    static constexpr bool mins = true;

    FN void unpack(InWords b, Block<Q5_1>& w) {
        U h = b.word(0);
        w.d = half_to_float(h);
        w.dmin = -half_to_float(h >> 16);
        unpack_nibbles(b, 8, w.codes);
        add_fifth_bits(b, 4, w.codes);
    }
};

struct Q8_0 {
    static constexpr int id = 8, block = 32, bytes = 34, group = 32, largest = 255, zero = WIDE_ZERO;
    static constexpr bool mins = false;

    FN void unpack(InWords b, Block<Q8_0>& w) {
        w.d = half_to_float(b.half(0));
        b.words4(2, w.codes);
        b.words4(18, w.codes + 4);
#pragma GCC unroll 8
        for (int j = 0; j < 8; ++j) w.codes[j] = wide_code(w.codes[j]);
    }
};

struct IQ4_NL {
    static constexpr int id = 20, block = 32, bytes = 18, group = 32, largest = 255,
                         zero = WIDE_ZERO;
    static constexpr bool mins = false;

    FN void unpack(InWords b, Block<IQ4_NL>& w) {
        w.d = half_to_float(b.half(0));
        unpack_table(b, 2, iq4_codes(), w.codes);
    }
};

constexpr int8_t FP4_CODES[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};
constexpr int8_t ONE_CODES[16] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};

struct MXFP4 {
    static constexpr int id = 39, block = 32, bytes = 17, group = 32, largest = 24, zero = 12;
    static constexpr bool mins = false;

    FN void unpack(InWords b, Block<MXFP4>& w) {
        U e = b.byte(0), small = (U)(e < 2);  // d = 2^(e - 128), for e < 2 a subnormal
        w.d = (F)((small & (1u << 21) << (e & 1)) | (~small & (e - 1) << 23));
        unpack_table(b, 1, table16(FP4_CODES), w.codes);
    }
};

// Every quantised format.
#define ISOBIT_QUANTISED(X)                                                                       \
    X(Q4_0) X(Q4_1) X(Q5_0) X(Q5_1) X(Q8_0) X(Q2_K) X(Q3_K) X(Q4_K) X(Q5_K) X(Q6_K) X(IQ4_NL)      \
    X(IQ4_XS) X(MXFP4)

}  // namespace isobit::ISOBIT_SIMD
