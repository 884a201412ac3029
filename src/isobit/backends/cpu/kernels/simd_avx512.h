// AVX-512 with VNNI: sixteen rows in a vector, dot products of bytes summed in 32 bits.
#pragma once

#include <immintrin.h>

#define ISOBIT_SIMD avx512vnni
#define ISOBIT_STREAMS  // has a second way to fetch weights: dispatch.cpp
#define ISOBIT_SIMD_NAME "avx512vnni"

namespace isobit::ISOBIT_SIMD {

constexpr int LANES = 16;
constexpr bool FUSES = true;  // products with one token use codes as they are unpacked
typedef uint32_t U __attribute__((vector_size(4 * LANES)));
typedef int32_t I __attribute__((vector_size(4 * LANES)));
typedef float F __attribute__((vector_size(4 * LANES)));
typedef int16_t H __attribute__((vector_size(4 * LANES)));

FN U load(const void* p) { return (U)_mm512_loadu_si512(p); }

FN U broadcast(const void* p) {
    int x;
    memcpy(&x, p, 4);
    return (U)_mm512_set1_epi32(x);
}

// Once v is known: else the compiler would heap prefetches up, more than the core can have under way.
template <bool stream>
FN void prefetch(const void* p, U& v) {
    if constexpr (stream)
        asm volatile("prefetchnta %1" : "+v"(v) : "m"(*(const char*)p));
    else
        asm volatile("prefetcht1 %1" : "+v"(v) : "m"(*(const char*)p));
}

FN void gather16(const uint8_t* const* rows, size_t offset, U* out) {
    __m512i v[4];
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
        __m256i x = _mm256_castsi128_si256(_mm_loadu_si128((const __m128i*)(rows[r] + offset)));
        x = _mm256_inserti128_si256(x, _mm_loadu_si128((const __m128i*)(rows[r + 4] + offset)), 1);
        __m256i y = _mm256_castsi128_si256(_mm_loadu_si128((const __m128i*)(rows[r + 8] + offset)));
        y = _mm256_inserti128_si256(y, _mm_loadu_si128((const __m128i*)(rows[r + 12] + offset)), 1);
        v[r] = _mm512_inserti64x4(_mm512_castsi256_si512(x), y, 1);
    }
    __m512i a = _mm512_unpacklo_epi32(v[0], v[1]), b = _mm512_unpacklo_epi32(v[2], v[3]);
    __m512i c = _mm512_unpackhi_epi32(v[0], v[1]), d = _mm512_unpackhi_epi32(v[2], v[3]);
    out[0] = (U)_mm512_unpacklo_epi64(a, b);
    out[1] = (U)_mm512_unpackhi_epi64(a, b);
    out[2] = (U)_mm512_unpacklo_epi64(c, d);
    out[3] = (U)_mm512_unpackhi_epi64(c, d);
}

// For each byte i < 16 of codes, byte i of the table (table16).
FN U look_up(U table, U codes) { return (U)_mm512_shuffle_epi8((__m512i)table, (__m512i)codes); }

FN F half_to_float(U v) { return (F)_mm512_cvtph_ps(_mm512_cvtepi32_epi16((__m512i)v)); }

FN I madd(U a, U b) { return (I)_mm512_madd_epi16((__m512i)a, (__m512i)b); }

typedef U Part;
constexpr int run(int) { return 1 << 16; }
FN Part dot(Part part, U codes, U x) {
    return (U)_mm512_dpbusd_epi32((__m512i)part, (__m512i)codes, (__m512i)x);
}

FN U scale_at(U bytes, int b) { return bytes >> 8 * b & 255; }
FN U signed_scale_at(U bytes, int b) { return (U)((I)bytes << (24 - 8 * b) >> 24); }
FN I scale_add(I sum, Part part, U scale) { return sum + (I)part * (I)scale; }
FN I total(Part part) { return (I)part; }

// Bytes b0 and b1 of each lane to its bytes `at` and 2 + `at`; zeros elsewhere.
FN U byte_pairs(U v, int b0, int b1, int at = 0) {
    __m512i lane =
        _mm512_broadcast_i32x4(_mm_set_epi32(0x0c0c0c0c, 0x08080808, 0x04040404, 0));
    unsigned pick = 0x80808080u ^ (0x80u ^ b0) << 8 * at ^ (0x80u ^ b1) << (16 + 8 * at);
    __m512i mask = _mm512_or_si512(lane, _mm512_set1_epi32((int)pick));
    return (U)_mm512_shuffle_epi8((__m512i)v, mask);
}

FN U signed_byte_pairs(U v, int b0, int b1) {
    return (U)_mm512_srai_epi16((__m512i)byte_pairs(v, b0, b1, 1), 8);
}

// The same for codes of all eight bits: signed bytes, kept as wide_code, WIDE_ZERO too large.
typedef Part WidePart;
constexpr int WIDE_RUN = 1 << 16, WIDE_ZERO = 128;
FN U wide_code(U raw) { return raw ^ 0x80808080u; }

}  // namespace isobit::ISOBIT_SIMD
