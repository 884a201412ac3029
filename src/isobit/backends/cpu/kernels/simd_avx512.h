// AVX-512 with VNNI: sixteen rows in a vector, dot products of bytes summed in 32 bits.
#pragma once

#include <immintrin.h>

#define ISOBIT_SIMD avx512vnni
#define ISOBIT_STREAMS  // has a second way to fetch weights: dispatch.cpp
#define ISOBIT_SIMD_NAME "avx512vnni"
#define ISOBIT_AMX  // has products by a matrix unit: matmul_amx.h

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
FN void prefetch(const void* p, U& v, bool stream) {
    if (stream)
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
#define ISOBIT_ADD_PAIRS
FN I add_pairs(I sum, U a, U b) { return (I)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b); }

typedef U Part;
constexpr int max_unspilled_sums(int) { return 1 << 16; }
FN Part dot(Part part, U codes, U x) {
    return (U)_mm512_dpbusd_epi32((__m512i)part, (__m512i)codes, (__m512i)x);
}

FN U scale_at(U bytes, int b) { return bytes >> 8 * b & 255; }
FN U signed_scale_at(U bytes, int b) { return (U)((I)bytes << (24 - 8 * b) >> 24); }
FN I scale_add(I sum, Part part, U scale) { return sum + (I)part * (I)scale; }
FN I total(Part part) { return (I)part; }

// Of rows of bytes (rows.h): each of 16 sub-scales beside the 16 bytes that it is for, in the c-th vector.
FN U spread_scales(const int16_t* scales, int c) {
    const __m512i four = _mm512_broadcast_i64x4(_mm256_load_si256((const __m256i*)scales));
    const __m512i lanes = _mm512_set_epi64(0x0003000300030003, 0x0003000300030003,
                                           0x0002000200020002, 0x0002000200020002,
                                           0x0001000100010001, 0x0001000100010001, 0, 0);
    return (U)_mm512_permutexvar_epi16(_mm512_add_epi16(lanes, _mm512_set1_epi16(4 * c)), four);
}
// sum + scale * codes * x, for codes up to 127.
FN I scaled_dot(I sum, U codes, U x, U scale) {
    return add_pairs(sum, (U)_mm512_maddubs_epi16((__m512i)codes, (__m512i)x), scale);
}
// Products of 16 pairs, added up in some lanes.
FN I dot_sixteen(const int16_t* a, const int16_t* b) {
    return (I)_mm512_zextsi256_si512(_mm256_madd_epi16(_mm256_load_si256((const __m256i*)a),
                                                       _mm256_load_si256((const __m256i*)b)));
}
// Codes, or `twice` less them where a bit is set.
FN U negated(U codes, int twice, const uint8_t* bits) {
    uint64_t mask;
    memcpy(&mask, bits, 8);
    return (U)_mm512_mask_sub_epi8((__m512i)codes, mask, _mm512_set1_epi8((char)twice), (__m512i)codes);
}
// Lane r: the sum over the lanes of v[r].
FN I added_across(const I* v) {
    __m512i four[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        const __m512i* a = (const __m512i*)v + 4 * i;
        __m512i s = _mm512_add_epi32(_mm512_unpacklo_epi32(a[0], a[1]), _mm512_unpackhi_epi32(a[0], a[1]));
        __m512i t = _mm512_add_epi32(_mm512_unpacklo_epi32(a[2], a[3]), _mm512_unpackhi_epi32(a[2], a[3]));
        four[i] = _mm512_add_epi32(_mm512_unpacklo_epi64(s, t), _mm512_unpackhi_epi64(s, t));
    }
    auto halves = [](__m512i a, __m512i b) __attribute__((always_inline)) {
        return _mm512_add_epi32(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xdd));
    };
    return (I)halves(halves(four[0], four[1]), halves(four[2], four[3]));
}

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
