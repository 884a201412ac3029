// What the kernels of a decode step share: launch order, norm and quantisation.
//
// Each kernel of the step starts while the one before it still runs, fetches weights that do not
// depend on it, and then waits for it (programmatic dependent launch). Nothing is written, and nothing
// that a kernel of the same step writes is read, before wait_for_previous(), except words that carry
// the step's number (`packed`), and by the guess of the experts, which may be wrong (guess.cuh).
//
// Shapes are compile-time constants: HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN, EXPERTS, USED.
#pragma once
#ifndef AT_ONCE
#define AT_ONCE 2  // common.cuh asks for it, so this file comes first
#endif
#include "common.cuh"

constexpr int BLOCK = 512, WARPS = BLOCK / WARP;
constexpr int HIDDEN_SUPERS = HIDDEN / SUPER, FFN_SUPERS = FFN / SUPER;
constexpr int HEADS_SUPERS = HEADS * HEAD_DIM / SUPER;

// Where the time of a step goes: with TIMELINE defined as the address of a buffer, every block notes
// there when it passed a point of a kernel (nanoseconds, of the last layer).
#ifdef TIMELINE
DEV void mark(int kernel, int point) {
    if (threadIdx.x) return;
    uint64 now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now)::"memory");
    int block = blockIdx.y * gridDim.x + blockIdx.x;
    reinterpret_cast<uint64*>(TIMELINE)[(kernel * 10 + point) * 256 + block % 256] = now;
}
#else
DEV void mark(int, int) {}
#endif

// What the step works on; it stays put in memory, so that one graph serves every step.
struct Step {
    int token, position;
    int not_finite;  // 1 when a logit was NaN or infinite
    int done;        // blocks of the head kernel that have ended
    int number;      // of the step, counting up
};

// An expert and its weight in one word, with the number of the step: whoever finds the number has all.
DEV uint64 packed(int number, int id, float weight) {
    return uint64(bits(weight)) << 32 | uint32(id & 0xffff) << 16 | uint32(number & 0xffff);
}
DEV bool is_of(uint64 one, int number) { return (uint32(one) & 0xffff) == (uint32(number) & 0xffff); }
DEV int chosen_id(uint64 one) { return uint32(one) >> 16; }
DEV float chosen_weight(uint64 one) { return isobit::from_bits(uint32(one >> 32)); }

// A superblock of x (global or shared) in a warp: eight values a lane.
DEV void load_super(const float* x, float (&v)[8]) {
    const float4* from = reinterpret_cast<const float4*>(x) + 2 * lane_id();
    float4 a = from[0], b = from[1];
    v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w, v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
}
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
