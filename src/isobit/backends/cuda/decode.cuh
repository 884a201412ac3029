// What the kernels of a decode step share: launch order, norm and quantisation in a block's prologue,
// and matrix-vector products over tiles.
//
// Each kernel of the step starts while the one before it still runs, fetches weights that do not
// depend on it, and then waits for it (programmatic dependent launch). Nothing is written, and nothing
// that a kernel of the same step writes is read, before wait_for_previous().
//
// Shapes are compile-time constants: HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN, EXPERTS, USED.
#pragma once
#include "tiles.cuh"

constexpr int WARPS = THREADS / WARP;
constexpr int HIDDEN_SUPERS = HIDDEN / SUPER, FFN_SUPERS = FFN / SUPER;
constexpr int HEADS_SUPERS = HEADS * HEAD_DIM / SUPER;

#ifndef EMULATED
DEV void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
DEV void let_next_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
#endif

// What the step works on; it stays put in memory, so that one graph serves every step.
struct Step {
    int token, position;
    int not_finite;  // 1 when a logit was NaN or infinite
    int done;        // blocks of the head kernel that have ended
};

// RMS norm of x (global) into y (shared), section 5. weight: the norm's, fetched ahead.
DEV void norm_to_shared(const float* x, const float (&weight)[HIDDEN_SUPERS], float eps, float* y,
                        float* buffer) {
    float v[HIDDEN_SUPERS], sum = 0.0f;
#pragma unroll
    for (int i = 0; i < HIDDEN_SUPERS; i++) v[i] = x[i * SUPER + threadIdx.x];
#pragma unroll
    for (int i = 0; i < HIDDEN_SUPERS; i++) sum = add(sum, mul(v[i], v[i]));
    float mean = div(block_tree(sum, buffer), float(HIDDEN));
    float r = div(1.0f, square_root(add(mean, eps)));
#pragma unroll
    for (int i = 0; i < HIDDEN_SUPERS; i++) y[i * SUPER + threadIdx.x] = mul(mul(v[i], r), weight[i]);
    __syncthreads();
}

DEV void fetch_norm(const float* from, float (&weight)[HIDDEN_SUPERS]) {
#pragma unroll
    for (int i = 0; i < HIDDEN_SUPERS; i++) weight[i] = from[i * SUPER + threadIdx.x];
}

// Superblocks of x (global or shared) to acts (shared), a warp each. A barrier must follow.
DEV void quantise_supers(const float* x, int supers, Act* acts) {
    for (int s = warp_id(); s < supers; s += WARPS) {
        const float4* from = reinterpret_cast<const float4*>(x + s * SUPER) + 2 * lane_id();
        float4 a = from[0], b = from[1];
        float v[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
        quantise_superblock(v, acts + s);
    }
}

DEV void copy_acts(const Act* from, int supers, Act* to) {
    for (int i = threadIdx.x; i < supers * int(sizeof(Act) / sizeof(int4)); i += THREADS)
        reinterpret_cast<int4*>(to)[i] = reinterpret_cast<const int4*>(from)[i];
}

// A block's tiles, four to a warp at a time (a step): eight lanes hold the eight rows of one. WHERE
// maps the number of a tile to its address and activation. The product of tile j and row r goes to
// part[8j + r]. Weights come through slots in shared memory (tiles.cuh), DEPTH steps of each warp ahead;
// slots: min(steps of the block, DEPTH * WARPS) of them.
template <class W, class Where, int DEPTH>
struct Products {
    static constexpr int SLOT = 4 * W::TILE_BYTES;
    DEV static int slot_bytes(int tiles) { return min((tiles + 3) / 4, DEPTH * WARPS) * SLOT; }
    const Where& where;
    uint8* slots;
    int tiles, turn, fetched;  // the warp's turn, 0 … WARPS-1; its steps fetched so far

    DEV Products(const Where& where, uint8* slots, int tiles, int turn)
        : where(where), slots(slots), tiles(tiles), turn(turn), fetched(0) {
        for (int i = 0; i < DEPTH; i++) fetch();
    }
    DEV int tile_of(int step) const { return 4 * (step * WARPS + turn) + lane_id() / TILE_ROWS; }
    DEV uint8* slot(int step) const { return slots + (step % DEPTH * WARPS + turn) * SLOT; }
    DEV void fetch() {
        int j = tile_of(fetched);
        if (j < tiles) W::fetch(where.tile(j), lane_id() % TILE_ROWS, slot(fetched));
        commit_copies();
        fetched++;
    }
    DEV void run(const Act* acts, float* part) {
        for (int step = 0; 4 * (step * WARPS + turn) < tiles; step++) {
            wait_copies<DEPTH - 1>();
            __syncwarp();
            int j = tile_of(step);
            if (j < tiles) {
                W w;
                w.load_slot(slot(step));
                const Act& a = acts[where.act(j)];
                part[j * TILE_ROWS + lane_id() % TILE_ROWS] = mul(a.d, w.dot(a));
            }
            __syncwarp();
            fetch();
        }
    }
};

// (((0 + p_0) + p_1) + …) over the superblocks of one row.
template <int SUPERS>
DEV float sum_supers(const float* part) {
    float sum = 0.0f;
#pragma unroll 8
    for (int s = 0; s < SUPERS; s++) sum = add(sum, part[s * TILE_ROWS]);
    return sum;
}

// How many of n things, dealt one by one to the blocks of the grid, are this block's.
DEV int dealt(int n) { return (n - int(blockIdx.x) + int(gridDim.x) - 1) / int(gridDim.x); }
