// The scalar arithmetic of docs/numerics.md that every compiled backend shares: fixed point, exp and
// SwiGLU. Compiled by the C++ compiler (with -ffp-contract=off) and by NVRTC; needs no header but
// memcpy's. Every float operation is one rounding; CUDA's intrinsics say so, whatever the flags.
#pragma once

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#define ISOBIT_FN __device__ __forceinline__
#else
#include <string.h>
#define ISOBIT_FN static inline __attribute__((always_inline))
#endif

namespace isobit {

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
ISOBIT_FN float add(float a, float b) { return __fadd_rn(a, b); }
ISOBIT_FN float sub(float a, float b) { return __fsub_rn(a, b); }
ISOBIT_FN float mul(float a, float b) { return __fmul_rn(a, b); }
ISOBIT_FN float div(float a, float b) { return __fdiv_rn(a, b); }
ISOBIT_FN float sub_exact_product(float a, float b, float c) { return __fmaf_rn(-b, c, a); }
ISOBIT_FN unsigned bits(float x) { return __float_as_uint(x); }
ISOBIT_FN float from_bits(unsigned u) { return __uint_as_float(u); }
#else
ISOBIT_FN float add(float a, float b) { return a + b; }
ISOBIT_FN float sub(float a, float b) { return a - b; }
ISOBIT_FN float mul(float a, float b) { return a * b; }
ISOBIT_FN float div(float a, float b) { return a / b; }
ISOBIT_FN float sub_exact_product(float a, float b, float c) { return a - b * c; }
ISOBIT_FN unsigned bits(float x) {
    unsigned u;
    memcpy(&u, &x, 4);
    return u;
}
ISOBIT_FN float from_bits(unsigned u) {
    float x;
    memcpy(&x, &u, 4);
    return x;
}
#endif

// Nearest integer, ties to even, for |x| < 2^22; biased() is 1.5 * 2^23 more, with it in the low bits.
ISOBIT_FN float biased(float x) { return add(x, 12582912.0f); }
ISOBIT_FN int round_int(float x) { return (int)(bits(biased(x)) - 0x4b400000u); }

// exp(c), section 5, for -87 <= c <= 88, as p * 2^n, n being in the low bits of `integer`. n is +0 where rint may
// give -0; r is the same.
ISOBIT_FN float exp_part(float c, float& integer) {
    integer = biased(mul(c, from_bits(0x3fb8aa3b)));
    float n = sub(integer, 12582912.0f);
    float r = sub(sub_exact_product(c, n, from_bits(0x3f318000)), mul(n, from_bits(0xb95e8083)));
    float p = from_bits(0x3ab511e7);
    p = add(mul(p, r), from_bits(0x3c091d10));
    p = add(mul(p, r), from_bits(0x3d2aac79));
    p = add(mul(p, r), from_bits(0x3e2aaa49));
    p = add(mul(p, r), from_bits(0x3efffffe));
    p = add(mul(p, r), 1.0f);
    return add(mul(p, r), 1.0f);
}
ISOBIT_FN float exp_between(float c) {
    float integer, p = exp_part(c, integer);
    return mul(p, from_bits((bits(integer) << 23) + (127u << 23)));  // a NaN comes through p
}

ISOBIT_FN float exp(float x) {
    float c = x < -87.0f ? -87.0f : x;
    c = c > 88.0f ? 88.0f : c;
    float y = exp_between(c);
    return x < -87.0f ? 0.0f : y;
}

// The same where x is not above 88.
ISOBIT_FN float exp_of_negative(float x) {
    float y = exp_between(x);  // of less than -87 anything
    return x < -87.0f ? 0.0f : y;
}

// log(x) of a positive normal number, section 11.
ISOBIT_FN float log(float x) {
    int n = ((int)bits(x) - 0x3f3504f3) >> 23;
    float f = sub(from_bits(bits(x) - ((unsigned)n << 23)), 1.0f);
    float p = from_bits(0xbd9c5ac4);
    p = add(mul(p, f), from_bits(0x3e02adb6));
    p = add(mul(p, f), from_bits(0xbe06c2a1));
    p = add(mul(p, f), from_bits(0x3e116d0e));
    p = add(mul(p, f), from_bits(0xbe2a3922));
    p = add(mul(p, f), from_bits(0x3e4cd004));
    p = add(mul(p, f), from_bits(0xbe800113));
    p = add(mul(p, f), from_bits(0x3eaaaaaa));
    float q = mul(f, f), k = (float)n;
    float r = sub(add(mul(mul(q, f), p), mul(k, from_bits(0xb95e8083))), mul(q, 0.5f));
    return add(add(r, f), mul(k, from_bits(0x3f318000)));
}

// The weight floor(p * 2^40) of 0 <= p <= 1 with the bit pattern b, section 10.
ISOBIT_FN unsigned long long weight(unsigned b) {
    unsigned down = 127u - (b >> 23);
    unsigned long long fraction = (b & 0x7fffffu) | 0x800000u;
    return fraction << 17 >> (down < 63u ? down : 63u);
}

// SwiGLU, section 5.
ISOBIT_FN float silu_gate(float gate, float up) {
    return mul(div(gate, add(1.0f, exp(-gate))), up);
}

// GELU in its tanh form times up, section 5.
ISOBIT_FN float gelu_gate(float gate, float up) {
    float cube = mul(mul(gate, gate), gate);
    float z = mul(add(gate, mul(cube, from_bits(0x3d372713))), from_bits(0x3fcc422a));
    return mul(div(gate, add(1.0f, exp(-z))), up);
}

// cap * tanh(x / cap), section 5.
ISOBIT_FN float softcap(float x, float cap) {
    if ((bits(x) & 0x7fffffffu) == 0x7f800000u) return x;
    float y = from_bits(bits(div(x, cap)) & 0x7fffffffu);
    float t = exp_of_negative(-add(y, y));
    float r = mul(cap, div(sub(1.0f, t), add(1.0f, t)));
    return from_bits((bits(r) & 0x7fffffffu) | (bits(x) & 0x80000000u));
}

// The scale of a block and the factor its values are multiplied with before rounding, section 3.
struct BlockScale {
    float d;
    float r;  // 0: every integer of the block is 0
};

// amax_bits: the largest |x_i| of the block, as a bit pattern without sign.
ISOBIT_FN BlockScale block_scale(unsigned amax_bits, int planes) {
    BlockScale s = {0.0f, 0.0f};
    if (amax_bits >= 0x7f800000u) {
        s.d = from_bits(0x7fc00000u);
    } else if (amax_bits >= 0x0f800000u) {  // 2^-96
        float amax = from_bits(amax_bits);
        s.d = mul(amax, from_bits(planes == 2 ? 0x38008183u : 0x3c010204u));
        s.r = div(planes == 2 ? 32639.0f : 127.0f, amax);
    }
    return s;
}

// One value of a block whose scale has a nonzero r.
ISOBIT_FN int quantise(float x, float r) { return round_int(mul(x, r)); }

// The signed bytes of a 16-bit integer: q = 256 * high + low.
ISOBIT_FN int high_plane(int q) { return (q + 128) >> 8; }
ISOBIT_FN int low_plane(int q) { return q - high_plane(q) * 256; }

}  // namespace isobit
