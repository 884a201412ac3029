// NEON with the dot-product extension (ARMv8.2): four rows in a vector. With i8mm (ARMv8.6) several
// tokens use its products of 2 × 8 by 8 × 2 bytes: two rows by both planes.
#pragma once

#include <arm_neon.h>

#ifdef __ARM_FEATURE_MATMUL_INT8
#define ISOBIT_SIMD neon_i8mm
#define ISOBIT_SIMD_NAME "neon_i8mm"
#else
#define ISOBIT_SIMD neon
#define ISOBIT_SIMD_NAME "neon"
#endif

namespace isobit::ISOBIT_SIMD {

constexpr int LANES = 4;
constexpr bool FUSES = true;  // products with one token use codes as they are unpacked
typedef uint32_t U __attribute__((vector_size(4 * LANES)));
typedef int32_t I __attribute__((vector_size(4 * LANES)));
typedef float F __attribute__((vector_size(4 * LANES)));
typedef int16_t H __attribute__((vector_size(4 * LANES)));

FN U load(const void* p) { return (U)vld1q_u8((const uint8_t*)p); }

FN U broadcast(const void* p) {
    uint32_t x;
    memcpy(&x, p, 4);
    return (U)vdupq_n_u32(x);
}

FN void prefetch(const void* p, U& v, bool) {
    asm volatile("prfm pldl2keep, [%1]" : "+w"(v) : "r"(p));
}

FN void gather16(const uint8_t* const* rows, size_t offset, U* out) {
    uint32x4_t v[4];
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) v[r] = (uint32x4_t)vld1q_u8(rows[r] + offset);
    uint32x4x2_t a = vtrnq_u32(v[0], v[1]), b = vtrnq_u32(v[2], v[3]);
    out[0] = (U)vcombine_u32(vget_low_u32(a.val[0]), vget_low_u32(b.val[0]));
    out[1] = (U)vcombine_u32(vget_low_u32(a.val[1]), vget_low_u32(b.val[1]));
    out[2] = (U)vcombine_u32(vget_high_u32(a.val[0]), vget_high_u32(b.val[0]));
    out[3] = (U)vcombine_u32(vget_high_u32(a.val[1]), vget_high_u32(b.val[1]));
}

// For each byte i < 16 of codes, byte i of the table (table16).
FN U look_up(U table, U codes) { return (U)vqtbl1q_u8((uint8x16_t)table, (uint8x16_t)codes); }

FN F half_to_float(U v) {
    return (F)vcvt_f32_f16(vreinterpret_f16_u16(vmovn_u32((uint32x4_t)v)));
}

FN I madd(U a, U b) {
    int16x8_t x = (int16x8_t)a, y = (int16x8_t)b;
    return (I)vpaddq_s32(vmull_s16(vget_low_s16(x), vget_low_s16(y)), vmull_high_s16(x, y));
}

typedef U Part;
constexpr int max_unspilled_sums(int) { return 1 << 16; }
FN Part dot(Part part, U codes, U x) {  // codes below 128 are the same signed
    return (U)vdotq_s32((int32x4_t)part, (int8x16_t)codes, (int8x16_t)x);
}

#ifdef __ARM_FEATURE_MATMUL_INT8
#define ISOBIT_PAIRS
// Rows 0 and 1, then 2 and 3, with eight codes each.
template <int P>
FN void make_pair(U* codes) {
    if constexpr (P == 1) return;
    uint32x4x2_t rows = vzipq_u32((uint32x4_t)codes[0], (uint32x4_t)codes[1]);
    codes[0] = (U)rows.val[0];
    codes[1] = (U)rows.val[1];
}

// With two planes a part holds (row, plane) 00 01 10 11 until it is settled.
template <int P, int T>
FN void dot_pair(Part (*part)[P], const U* codes, const Activations* const* x, int at) {
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) {
        const int8_t *high = x[t]->plane[0] + at, *low = x[t]->plane[1] + at;
        const int8x16_t planes = vcombine_s8(vld1_s8(high), vld1_s8(low));
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i)
            if constexpr (P == 1)
                part[t][0] = dot(part[t][0], codes[i], broadcast(high + 4 * i));
            else
                part[t][i] = (U)vmmlaq_s32((int32x4_t)part[t][i], (int8x16_t)codes[i], planes);
    }
}

template <int P>
FN void reduce_lanes(Part* part) {
    if constexpr (P == 1) return;
    uint32x4x2_t planes = vuzpq_u32((uint32x4_t)part[0], (uint32x4_t)part[1]);
    part[0] = (U)planes.val[0];
    part[1] = (U)planes.val[1];
}
#endif

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
    const int32x4_t* a = (const int32x4_t*)v;
    return (I)vpaddq_s32(vpaddq_s32(a[0], a[1]), vpaddq_s32(a[2], a[3]));
}
// Codes, or `twice` less them where a bit is set.
FN U negated(U codes, int twice, const uint8_t* bits) {
    const uint8x16_t bit = (uint8x16_t)vdupq_n_u64(0x8040201008040201);
    const uint8x16_t two = vcombine_u8(vdup_n_u8(bits[0]), vdup_n_u8(bits[1]));
    const uint8x16_t c = (uint8x16_t)codes, other = vsubq_u8(vdupq_n_u8((uint8_t)twice), c);
    return (U)vbslq_u8(vtstq_u8(two, bit), other, c);
}

FN U byte_pairs(U v, int b0, int b1) { return (v >> 8 * b0 & 255) | (v >> 8 * b1 & 255) << 16; }
FN U signed_byte_pairs(U v, int b0, int b1) {
    return (U)((I)v << (24 - 8 * b0) >> 24 & 0xffff) | (U)((I)v << (24 - 8 * b1) >> 24 << 16);
}

// The same for codes of all eight bits: signed bytes, kept as wide_code, WIDE_ZERO too large.
typedef Part WidePart;
constexpr int WIDE_RUN = 1 << 16, WIDE_ZERO = 0;
FN U wide_code(U raw) { return raw; }

}  // namespace isobit::ISOBIT_SIMD
