// Formats of few bits, whose codes are looked up in grids or come from digits: a row's superblock at a
// time becomes bytes, by the same code for every SIMD level. Layouts: isobit/gguf/blocks.py, grids.py.
#pragma once

#include "kernels.h"
#include "scalar.h"

namespace isobit {

// A binary16, exactly.
FN float half_value(const uint8_t* p) {
    uint16_t x;
    memcpy(&x, p, 2);
    uint32_t sign = (uint32_t)(x & 0x8000) << 16, rest = x & 0x7fff;
    // As a binary32 the exponent is 112 too small; multiplying is exact and mends subnormals.
    float y = from_bits(rest << 13) * from_bits(0x77800000u);
    uint32_t special = rest >= 0x7c00 ? 0x7f800000u : 0;
    return from_bits(bits(y) | special | sign);
}

struct alignas(16) Decoded {
    uint8_t codes[SUPERBLOCK];       // DecodedFormat::zero too large
    int8_t scales[SUPERBLOCK / 16];  // of each 16 values
    float d[SUPERBLOCK / 16];        // of each part
};

struct DecodedFormat {
    const char* name;
    int type, block, bytes;
    int part;  // values with one d
    int zero;  // also the largest code's magnitude
    void (*decode)(const uint8_t* superblock, Decoded& out);
};

#define ISOBIT_DECODED(X)                                                                         \
    X(IQ1_S) X(IQ1_M) X(IQ2_XXS) X(IQ2_XS) X(IQ2_S) X(IQ3_XXS) X(IQ3_S) X(TQ1_0) X(TQ2_0) X(Q1_0)  \
    X(Q2_0)

#define ISOBIT_DECODE(Format) void decode_##Format(const uint8_t* superblock, Decoded& out);
ISOBIT_DECODED(ISOBIT_DECODE)
#undef ISOBIT_DECODE

constexpr int NARROW = 15, WIDE = 62;  // zeros
inline constexpr DecodedFormat decoded_IQ1_S = {"IQ1_S", 19, 256, 50, 256, NARROW, decode_IQ1_S};
inline constexpr DecodedFormat decoded_IQ1_M = {"IQ1_M", 29, 256, 56, 256, NARROW, decode_IQ1_M};
inline constexpr DecodedFormat decoded_IQ2_XXS = {"IQ2_XXS", 16, 256, 66, 256, WIDE, decode_IQ2_XXS};
inline constexpr DecodedFormat decoded_IQ2_XS = {"IQ2_XS", 17, 256, 74, 256, WIDE, decode_IQ2_XS};
inline constexpr DecodedFormat decoded_IQ2_S = {"IQ2_S", 22, 256, 82, 256, WIDE, decode_IQ2_S};
inline constexpr DecodedFormat decoded_IQ3_XXS = {"IQ3_XXS", 18, 256, 98, 256, WIDE, decode_IQ3_XXS};
inline constexpr DecodedFormat decoded_IQ3_S = {"IQ3_S", 21, 256, 110, 256, NARROW, decode_IQ3_S};
inline constexpr DecodedFormat decoded_TQ1_0 = {"TQ1_0", 34, 256, 54, 256, NARROW, decode_TQ1_0};
inline constexpr DecodedFormat decoded_TQ2_0 = {"TQ2_0", 35, 256, 66, 256, NARROW, decode_TQ2_0};
inline constexpr DecodedFormat decoded_Q1_0 = {"Q1_0", 41, 128, 18, 128, NARROW, decode_Q1_0};
inline constexpr DecodedFormat decoded_Q2_0 = {"Q2_0", 42, 64, 18, 64, NARROW, decode_Q2_0};

}  // namespace isobit
