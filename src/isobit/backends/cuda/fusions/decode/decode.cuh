// What the kernels of a fused layer of one token share: norm and quantisation.
//
// Shapes are compile-time constants: HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN, EXPERTS, USED.
#pragma once
#include "step.cuh"

constexpr int BLOCK = 512, WARPS = BLOCK / WARP;
constexpr int HIDDEN_SUPERS = HIDDEN / SUPER, FFN_SUPERS = FFN / SUPER;
constexpr int HEADS_SUPERS = HEADS * HEAD_DIM / SUPER;

// RMS norm of x (section 5). The block's first half adds up squares, a column a thread; each superblock
// is normed by one warp, the second half's warps first.
struct Norm {
    static constexpr int EACH = (HIDDEN_SUPERS + WARPS - 1) / WARPS;
    float weight[EACH][8];  // fetched ahead

    DEV static int super(int i) { return (warp_id() + WARPS / 2) % WARPS + i * WARPS; }
    DEV Norm(const float* norm) {
#pragma unroll
        for (int i = 0; i < EACH; i++)
            if (super(i) < HIDDEN_SUPERS) load_super(norm + super(i) * SUPER, weight[i]);
    }
    // columns(x, r): by each thread of the first half, the column's values and the norm's factor.
    // supers(s, values): by a warp, the normed superblock s. A barrier must follow.
    template <class Columns, class Supers>
    DEV void run(const float* x, float eps, float* buffer, Columns columns, Supers supers) {
        float v[EACH][8], column[HIDDEN_SUPERS];
        bool adds = threadIdx.x < SUPER;
        if (adds)
#pragma unroll
            for (int i = 0; i < HIDDEN_SUPERS; i++) column[i] = x[i * SUPER + threadIdx.x];
#pragma unroll
        for (int i = 0; i < EACH; i++)
            if (super(i) < HIDDEN_SUPERS) load_super(x + super(i) * SUPER, v[i]);
        if (adds) {
            float sum = 0.0f;
#pragma unroll
            for (int i = 0; i < HIDDEN_SUPERS; i++) sum = add(sum, mul(column[i], column[i]));
            buffer[threadIdx.x] = sum;
        }
        __syncthreads();
        float mean = div(buffer_tree(buffer), float(HIDDEN));
        float r = div(1.0f, square_root(add(mean, eps)));
        if (adds) columns(column, r);
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            if (super(i) >= HIDDEN_SUPERS) continue;
#pragma unroll
            for (int k = 0; k < 8; k++) v[i][k] = mul(mul(v[i][k], r), weight[i][k]);
            supers(super(i), v[i]);
        }
    }
    // The whole of x quantised, to shared memory.
    DEV void quantise(const float* x, float eps, float* buffer, Act* acts) {
        run(x, eps, buffer, [](const float (&)[HIDDEN_SUPERS], float) {},
            [&](int s, const float (&values)[8]) { quantise_without_digits(values, acts + s); });
    }
};

// Superblocks of x to acts (shared), two a warp at a time: both are loaded before either is worked on.
// A barrier must follow.
DEV void quantise_supers(const float* x, int supers, Act* acts) {
    for (int s = warp_id(); s < supers; s += 2 * WARPS) {
        float v[2][8];
        bool two = s + WARPS < supers;
        load_super(x + s * SUPER, v[0]);
        if (two) load_super(x + (s + WARPS) * SUPER, v[1]);
        quantise_without_digits(v[0], acts + s);
        if (two) quantise_without_digits(v[1], acts + s + WARPS);
    }
}

// How many of n things, dealt one by one to the blocks of the grid, are this block's.
DEV int dealt(int n) { return (n - int(blockIdx.x) + int(gridDim.x) - 1) / int(gridDim.x); }
