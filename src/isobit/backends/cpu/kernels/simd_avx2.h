// AVX2 and F16C: eight rows in a vector.
#pragma once

#include <immintrin.h>

#define ISOBIT_SIMD avx2
#define ISOBIT_STREAMS  // has a second way to fetch weights: dispatch.cpp
#define ISOBIT_SIMD_NAME "avx2"

namespace isobit::ISOBIT_SIMD {

constexpr int LANES = 8;
constexpr bool FUSES = true;  // products with one token use codes as they are unpacked
typedef uint32_t U __attribute__((vector_size(4 * LANES)));
typedef int32_t I __attribute__((vector_size(4 * LANES)));
typedef float F __attribute__((vector_size(4 * LANES)));
typedef int16_t H __attribute__((vector_size(4 * LANES)));

FN U load(const void* p) { return (U)_mm256_loadu_si256((const __m256i*)p); }

FN U broadcast(const void* p) {
    int x;
    memcpy(&x, p, 4);
    return (U)_mm256_set1_epi32(x);
}

// Once v is known: else the compiler would heap prefetches up, more than the core can have under way.
FN void prefetch(const void* p, U& v, bool stream) {
    if (stream)
        asm volatile("prefetchnta %1" : "+x"(v) : "m"(*(const char*)p));
    else
        asm volatile("prefetcht1 %1" : "+x"(v) : "m"(*(const char*)p));
}

FN void gather16(const uint8_t* const* rows, size_t offset, U* out) {
    __m256i v[4];
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
        __m128i low = _mm_loadu_si128((const __m128i*)(rows[r] + offset));
        __m128i high = _mm_loadu_si128((const __m128i*)(rows[r + 4] + offset));
        v[r] = _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
    }
    __m256i a = _mm256_unpacklo_epi32(v[0], v[1]), b = _mm256_unpacklo_epi32(v[2], v[3]);
    __m256i c = _mm256_unpackhi_epi32(v[0], v[1]), d = _mm256_unpackhi_epi32(v[2], v[3]);
    out[0] = (U)_mm256_unpacklo_epi64(a, b);
    out[1] = (U)_mm256_unpackhi_epi64(a, b);
    out[2] = (U)_mm256_unpacklo_epi64(c, d);
    out[3] = (U)_mm256_unpackhi_epi64(c, d);
}

// For each byte i < 16 of codes, byte i of the table (table16).
FN U look_up(U table, U codes) { return (U)_mm256_shuffle_epi8((__m256i)table, (__m256i)codes); }

FN F half_to_float(U v) {
    __m256i low = _mm256_and_si256((__m256i)v, _mm256_set1_epi32(0xffff));
    __m128i h = _mm_packus_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1));
    return (F)_mm256_cvtph_ps(h);
}

FN I madd(U a, U b) { return (I)_mm256_madd_epi16((__m256i)a, (__m256i)b); }

// A part holds two 16-bit sums a lane, each of up to 2 * 128 * code a step.
typedef U Part;
constexpr int max_unspilled_sums(int largest_code) { return 32767 / (256 * largest_code); }
FN Part dot(Part part, U codes, U x) {
    return (U)_mm256_add_epi16((__m256i)part, _mm256_maddubs_epi16((__m256i)codes, (__m256i)x));
}

FN I scale_add(I sum, Part part, U scale) { return sum + madd(part, scale); }
FN I total(Part part) { return madd(part, (U)_mm256_set1_epi16(1)); }

// Bytes b0 and b1 of each lane to its bytes `at` and 2 + `at`; zeros elsewhere.
FN U byte_pairs(U v, int b0, int b1, int at = 0) {
    __m256i lane = _mm256_set_epi32(0x0c0c0c0c, 0x08080808, 0x04040404, 0, 0x0c0c0c0c, 0x08080808,
                                    0x04040404, 0);
    unsigned pick = 0x80808080u ^ (0x80u ^ b0) << 8 * at ^ (0x80u ^ b1) << (16 + 8 * at);
    __m256i mask = _mm256_or_si256(lane, _mm256_set1_epi32((int)pick));
    return (U)_mm256_shuffle_epi8((__m256i)v, mask);
}

FN U signed_byte_pairs(U v, int b0, int b1) {
    return (U)_mm256_srai_epi16((__m256i)byte_pairs(v, b0, b1, 1), 8);
}

// Of rows of bytes (rows.h): each of 16 sub-scales beside the 16 bytes that it is for, in the c-th vector.
FN U spread_scales(const int16_t* scales, int c) {
    const __m256i eight =
        _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i*)scales + c / 4));
    const int low = (0x0100 + c % 4 * 0x0404) * 0x10001, high = low + 0x02020202;
    return (U)_mm256_shuffle_epi8(eight, _mm256_set_m128i(_mm_set1_epi32(high), _mm_set1_epi32(low)));
}
// sum + scale * codes * x, for codes up to 127.
FN I scaled_dot(I sum, U codes, U x, U scale) { return scale_add(sum, dot(Part{}, codes, x), scale); }
// Products of 16 pairs, added up in some lanes.
FN I dot_sixteen(const int16_t* a, const int16_t* b) { return madd(load(a), load(b)); }
// Codes, or `twice` less them where a bit is set.
FN U negated(U codes, int twice, const uint8_t* bits) {
    int four;
    memcpy(&four, bits, 4);
    const __m256i bytes = _mm256_set_epi64x(0x0303030303030303, 0x0202020202020202,
                                            0x0101010101010101, 0);
    const __m256i bit = _mm256_set1_epi64x((long long)0x8040201008040201);
    const __m256i set = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(four), bytes), bit);
    const __m256i other = _mm256_sub_epi8(_mm256_set1_epi8((char)twice), (__m256i)codes);
    return (U)_mm256_blendv_epi8((__m256i)codes, other, _mm256_cmpeq_epi8(set, bit));
}
// Lane r: the sum over the lanes of v[r].
FN I added_across(const I* v) {
    __m256i four[2];
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
        const __m256i* a = (const __m256i*)v + 4 * i;
        __m256i s = _mm256_add_epi32(_mm256_unpacklo_epi32(a[0], a[1]), _mm256_unpackhi_epi32(a[0], a[1]));
        __m256i t = _mm256_add_epi32(_mm256_unpacklo_epi32(a[2], a[3]), _mm256_unpackhi_epi32(a[2], a[3]));
        four[i] = _mm256_add_epi32(_mm256_unpacklo_epi64(s, t), _mm256_unpackhi_epi64(s, t));
    }
    return (I)_mm256_add_epi32(_mm256_permute2x128_si256(four[0], four[1], 0x20),
                               _mm256_permute2x128_si256(four[0], four[1], 0x31));
}

// The same byte as both 16-bit factors of scale_add.
FN U scale_at(U bytes, int b) { return byte_pairs(bytes, b, b); }
FN U signed_scale_at(U bytes, int b) { return signed_byte_pairs(bytes, b, b); }

// The same for codes of all eight bits: signed bytes, kept as wide_code, WIDE_ZERO too large. They
// would overflow the 16-bit sums, so each nibble has its own.
struct WidePart {
    Part low, high;
};
constexpr int WIDE_RUN = max_unspilled_sums(15), WIDE_ZERO = 128;
FN U wide_code(U raw) { return raw ^ 0x80808080u; }
FN WidePart dot(WidePart part, U codes, U x) {
    return {dot(part.low, codes & 0x0f0f0f0fu, x), dot(part.high, codes >> 4 & 0x0f0f0f0fu, x)};
}
FN I scale_add(I sum, WidePart part, U scale) {
    return scale_add(scale_add(sum, part.low, scale), part.high,
                     (U)_mm256_slli_epi16((__m256i)scale, 4));
}
FN I total(WidePart part) { return total(part.low) + madd(part.high, (U)_mm256_set1_epi16(16)); }

// Or with whole activations, bytes 0 and 2 of a lane, then 1 and 3: half as many steps in two planes.
#define ISOBIT_WORDS
FN I dot_words(I sum, U codes, const int16_t* x) {
    sum += madd(codes & 0x00ff00ffu, broadcast(x));
    return sum + madd((U)_mm256_srli_epi16((__m256i)codes, 8), broadcast(x + 2));
}

}  // namespace isobit::ISOBIT_SIMD
