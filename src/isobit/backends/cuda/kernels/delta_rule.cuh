// The gated delta rule (docs/numerics.md, section 12): what the kernels of prompts and of steps share.
#pragma once
#include "common.cuh"

// tree() over the rows, of which a lane has every 32nd; with fewer than 32, lanes beyond repeat them.
template <int N, int MINE>
DEV float rows_tree(float (&v)[MINE]) {
    constexpr int LANES = N < WARP ? N : WARP;
#pragma unroll
    for (int n = MINE / 2; n; n /= 2)
#pragma unroll
        for (int i = 0; i < n; i++) v[i] = add(v[i], v[i + n]);
#pragma unroll
    for (int n = LANES / 2; n; n /= 2) v[0] = add(v[0], shuffle_xor(v[0], n));
    return v[0];
}

// A token's effect on the column s of a state, of which a lane has every 32nd row, and what it reads there.
// keep: e to the decay.
template <int N, bool CORRECTED, int MINE>
DEV float delta_step(float (&s)[MINE], const float (&q)[MINE], const float (&k)[MINE], float value, float rate,
                     float keep) {
    float part[MINE];
#pragma unroll
    for (int i = 0; i < MINE; i++) {
        s[i] = mul(s[i], keep);
        if (CORRECTED) part[i] = mul(s[i], k[i]);
    }
    float d = mul(CORRECTED ? sub(value, rows_tree<N>(part)) : value, rate);
#pragma unroll
    for (int i = 0; i < MINE; i++) {
        s[i] = add(s[i], mul(k[i], d));
        part[i] = mul(s[i], q[i]);
    }
    return rows_tree<N>(part);
}

// log(1 + e^x) as specified.
DEV float softplus(float x) {
    const float odd[] = {1.0f / 13, 1.0f / 11, 1.0f / 9, 1.0f / 7, 1.0f / 5, 1.0f / 3, 1.0f};
    float u = isobit::exp(-fabsf(x)), h = div(u, add(2.0f, u)), z = mul(h, h), p = 1.0f / 15;
#pragma unroll
    for (int k = 0; k < 7; k++) p = add(mul(p, z), odd[k]);
    return add(fmaxf(x, 0.0f), mul(add(h, h), p));
}
DEV float sigmoid(float x) { return div(1.0f, add(1.0f, isobit::exp(-x))); }
