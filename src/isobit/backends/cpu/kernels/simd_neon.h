// NEON with the dot-product extension (ARMv8.2): four rows in a vector.
#pragma once

#include <arm_neon.h>

#define ISOBIT_SIMD neon
#define ISOBIT_SIMD_NAME "neon"

namespace isobit::ISOBIT_SIMD {

constexpr int LANES = 4;
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

FN void prefetch(const void* p, U& v) {
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

FN F half_to_float(U v) {
    return (F)vcvt_f32_f16(vreinterpret_f16_u16(vmovn_u32((uint32x4_t)v)));
}

FN I madd(U a, U b) {
    int16x8_t x = (int16x8_t)a, y = (int16x8_t)b;
    return (I)vpaddq_s32(vmull_s16(vget_low_s16(x), vget_low_s16(y)), vmull_high_s16(x, y));
}

typedef U Part;
constexpr int run(int) { return 1 << 16; }
FN Part dot(Part part, U codes, U x) {  // codes below 128 are the same signed
    return (U)vdotq_s32((int32x4_t)part, (int8x16_t)codes, (int8x16_t)x);
}

FN U scale_at(U bytes, int b) { return bytes >> 8 * b & 255; }
FN U signed_scale_at(U bytes, int b) { return (U)((I)bytes << (24 - 8 * b) >> 24); }
FN I scale_add(I sum, Part part, U scale) { return sum + (I)part * (I)scale; }
FN I total(Part part) { return (I)part; }

FN U byte_pairs(U v, int b0, int b1) { return (v >> 8 * b0 & 255) | (v >> 8 * b1 & 255) << 16; }
FN U signed_byte_pairs(U v, int b0, int b1) {
    return (U)((I)v << (24 - 8 * b0) >> 24 & 0xffff) | (U)((I)v << (24 - 8 * b1) >> 24 << 16);
}

typedef U Part8;
constexpr int ZERO8 = 0;  // signed bytes as they are
FN U code8(U raw) { return raw; }
FN Part8 dot8(Part8 part, U codes, U x) { return dot(part, codes, x); }
FN I total8(Part8 part) { return (I)part; }

}  // namespace isobit::neon
