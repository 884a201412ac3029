// The gated delta rule (docs/numerics.md, section 12): what the kernels of prompts and of steps share.
#pragma once
#include "common.cuh"

// tree() over the N rows of each of C columns, of which a lane has every 32nd; with fewer than 32, lanes beyond repeat
// them. A lane gets one column's: lanes lie in C equal runs, the c-th has column c's. Columns part where lanes first meet,
// so that it takes C - 1 + log2(32 / C) shuffles instead of 5 C. C > 1: N >= 32.
template <int N, int C, int MINE>
DEV float columns_tree(float (&v)[C][MINE]) {
    int n = (N < WARP ? N : WARP) / 2;
#pragma unroll
    for (int c = 0; c < C; c++)
#pragma unroll
        for (int m = MINE / 2; m; m /= 2)
#pragma unroll
            for (int i = 0; i < m; i++) v[c][i] = add(v[c][i], v[c][i + m]);
#pragma unroll
    for (int half = C / 2; half; half /= 2, n /= 2) {
        bool upper = lane_id() & n;
#pragma unroll
        for (int c = 0; c < half; c++) {
            float sent = upper ? v[c][0] : v[c + half][0], kept = upper ? v[c + half][0] : v[c][0];
            v[c][0] = add(kept, shuffle_xor(sent, n));
        }
    }
#pragma unroll
    for (; n; n /= 2) v[0][0] = add(v[0][0], shuffle_xor(v[0][0], n));
    return v[0][0];
}

// A token's effect on C columns s of a state, of which a lane has every 32nd row, and what it reads in the lane's column
// (columns_tree), of which `value` is the token's. keep: e to the decay.
template <int N, bool CORRECTED, int C, int MINE>
DEV float delta_step(float (&s)[C][MINE], const float (&q)[MINE], const float (&k)[MINE], float value, float rate,
                     float keep) {
    float part[C][MINE];
#pragma unroll
    for (int c = 0; c < C; c++)
#pragma unroll
        for (int i = 0; i < MINE; i++) {
            s[c][i] = mul(s[c][i], keep);
            if (CORRECTED) part[c][i] = mul(s[c][i], k[i]);
        }
    float d = mul(CORRECTED ? sub(value, columns_tree<N>(part)) : value, rate);
#pragma unroll
    for (int c = 0; c < C; c++) {
        float own = C == 1 ? d : shuffle(d, WARP / C * c);
#pragma unroll
        for (int i = 0; i < MINE; i++) {
            s[c][i] = add(s[c][i], mul(k[i], own));
            part[c][i] = mul(s[c][i], q[i]);
        }
    }
    return columns_tree<N>(part);
}

// log(1 + e^x) as specified.
DEV float softplus(float x) {
    const float odd[] = {1.0f / 13, 1.0f / 11, 1.0f / 9, 1.0f / 7, 1.0f / 5, 1.0f / 3, 1.0f};
    float u = isobit::exp(-fabsf(x)), h = div(u, add(2.0f, u)), z = mul(h, h), p = 1.0f / 15;
#pragma unroll
    for (int k = 0; k < 7; k++) p = add(mul(p, z), odd[k]);
    return add(fmaxf(x, 0.0f), mul(add(h, h), p));
}
// How much of a state a token keeps, as a logarithm; dt, a: of the head.
DEV float log_decay(float x, float dt, float a) { return mul(softplus(add(x, dt)), a); }

// A head vector of N values in a warp, lane + 32 i, to L2 norm 1, times scale.
template <int N, int MINE>
DEV void l2_norm(float (&v)[MINE], float eps, float scale) {
    float square[1][MINE];
#pragma unroll
    for (int i = 0; i < MINE; i++) square[0][i] = mul(v[i], v[i]);
    float r = div(1.0f, square_root(add(columns_tree<N>(square), eps)));
#pragma unroll
    for (int i = 0; i < MINE; i++) v[i] = mul(mul(v[i], r), scale);
}

// RMS norm of head vectors of N values times the SiLU of a gate; of a superblock of them a lane of the warp has eight
// values.
template <int N>
DEV void gated_norm(float (&v)[8], const float (&gate)[8], const float (&weight)[8], float eps) {
    static_assert(SUPER % N == 0 && N >= 8, "whole vectors in a superblock, lanes in a vector");
    float sum[8];
#pragma unroll
    for (int i = 0; i < 8; i++) sum[i] = mul(v[i], v[i]);
#pragma unroll
    for (int n = N / 16; n; n /= 2)  // tree() of a vector, in N / 8 lanes
#pragma unroll
        for (int i = 0; i < 8; i++) sum[i] = add(sum[i], shuffle_xor(sum[i], n));
#pragma unroll
    for (int n = 4; n; n /= 2)
#pragma unroll
        for (int i = 0; i < n; i++) sum[i] = add(sum[i], sum[i + n]);
    float r = div(1.0f, square_root(add(mean_of<N>(sum[0]), eps)));
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] = isobit::silu_gate(gate[i], mul(mul(v[i], r), weight[i]));
}
