// The primitives in plain vector arithmetic, for any machine. A vector has one 32-bit lane for each
// weight row; a lane holds four bytes, two 16-bit integers, one integer or one float.
#pragma once

#define ISOBIT_SIMD portable
#define ISOBIT_SIMD_NAME "portable"

namespace isobit::ISOBIT_SIMD {

constexpr int LANES = 4;
constexpr bool FUSES = false;  // speed is not what this level is for; compiling would take a minute
typedef uint32_t U __attribute__((vector_size(4 * LANES)));
typedef int32_t I __attribute__((vector_size(4 * LANES)));
typedef float F __attribute__((vector_size(4 * LANES)));
typedef int16_t H __attribute__((vector_size(4 * LANES)));

FN U load(const void* p) {
    U v;
    memcpy(&v, p, sizeof v);
    return v;
}

FN U broadcast(const void* p) {
    uint32_t x;
    memcpy(&x, p, 4);
    return x - U{};
}

FN void prefetch(const void* p, U&, bool) { __builtin_prefetch(p, 0, 2); }

// 16 bytes at the same offset of each row: out[j] holds every row's j-th four bytes.
FN void gather16(const uint8_t* const* rows, size_t offset, U* out) {
    uint32_t word[LANES][4];
#pragma GCC unroll 4
    for (int r = 0; r < LANES; ++r) memcpy(word[r], rows[r] + offset, 16);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) out[j] = U{word[0][j], word[1][j], word[2][j], word[3][j]};
}

// For each byte i < 16 of codes, byte i of the table (table16).
APART U look_up(U table, U codes) {
    typedef uint8_t Bytes __attribute__((vector_size(4 * LANES)));
    return (U)__builtin_shuffle((Bytes)table, (Bytes)codes);
}

// The low half of each lane as binary16, exactly.
APART F half_to_float(U v) {
    F out;
#pragma GCC unroll 4
    for (int r = 0; r < LANES; ++r) {
        uint32_t h = v[r] & 0xffff, sign = (h & 0x8000) << 16, rest = h & 0x7fff;
        float x = rest >= 0x7c00   ? from_bits(0x7f800000u | rest << 13)
                  : rest >= 0x0400 ? from_bits((rest << 13) + 0x38000000u)
                                   : (float)rest * 5.9604644775390625e-8f;
        out[r] = from_bits(bits(x) | sign);
    }
    return out;
}

// Products of two pairs of 16-bit integers, added.
APART I madd(U a, U b) {
    I x = (I)a, y = (I)b;
    return (x << 16 >> 16) * (y << 16 >> 16) + (x >> 16) * (y >> 16);
}

// A running dot product of unsigned codes and signed bytes; it stays exact for max_unspilled_sums(largest code)
// steps, after which it goes to a sum.
typedef U Part;
constexpr int max_unspilled_sums(int) { return 1 << 16; }
APART Part dot(Part part, U codes, U x) {
    I c = (I)codes, y = (I)x;
    return (U)((I)part + (c & 255) * (y << 24 >> 24) + (c >> 8 & 255) * (y << 16 >> 24) +
               (c >> 16 & 255) * (y << 8 >> 24) + (I)(codes >> 24) * (y >> 24));
}

// Byte b of each lane as a sub-scale for scale_add.
FN U scale_at(U bytes, int b) { return bytes >> 8 * b & 255; }
FN U signed_scale_at(U bytes, int b) { return (U)((I)bytes << (24 - 8 * b) >> 24); }
FN I scale_add(I sum, Part part, U scale) { return sum + (I)part * (I)scale; }
FN I total(Part part) { return (I)part; }

// Of rows of bytes (rows.h): the sub-scale of the c-th 16 bytes in each lane.
FN U spread_scales(const int16_t* scales, int c) { return (U)(scales[c] - I{}); }
// sum + scale * codes * x, for codes up to 127.
FN I scaled_dot(I sum, U codes, U x, U scale) { return scale_add(sum, dot(Part{}, codes, x), scale); }
// Products of 16 pairs, added up in some lanes.
FN I dot_sixteen(const int16_t* a, const int16_t* b) {
    I sum = {};
#pragma GCC unroll 2
    for (int i = 0; i < 16; i += 8) sum += madd(load(a + i), load(b + i));
    return sum;
}
// Lane r: the sum over the lanes of v[r].
FN I added_across(const I* v) {
    I sum;
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) sum[r] = v[r][0] + v[r][1] + v[r][2] + v[r][3];
    return sum;
}
// Codes, or `twice` less them where a bit is set.
FN U negated(U codes, int twice, const uint8_t* bits) {
    typedef uint8_t Bytes __attribute__((vector_size(4 * LANES)));
    Bytes c = (Bytes)codes;
    for (int i = 0; i < 16; ++i) c[i] = bits[i / 8] >> i % 8 & 1 ? twice - c[i] : c[i];
    return (U)c;
}

// Bytes b0 and b1 of each lane as two 16-bit integers.
FN U byte_pairs(U v, int b0, int b1) { return (v >> 8 * b0 & 255) | (v >> 8 * b1 & 255) << 16; }
FN U signed_byte_pairs(U v, int b0, int b1) {
    return (U)((I)v << (24 - 8 * b0) >> 24 & 0xffff) | (U)((I)v << (24 - 8 * b1) >> 24 << 16);
}

// The same for codes of all eight bits: signed bytes, kept as wide_code, WIDE_ZERO too large.
typedef Part WidePart;
constexpr int WIDE_RUN = 1 << 16, WIDE_ZERO = 128;
FN U wide_code(U raw) { return raw ^ 0x80808080u; }

}  // namespace isobit::portable
