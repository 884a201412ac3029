// What the kernels of a decode step share: launch order, norm and quantisation in a block's prologue,
// and matrix-vector products over tiles.
//
// Each kernel of the step starts while the one before it still runs, fetches weights that do not
// depend on it, and then waits for it (programmatic dependent launch). Nothing is written, and nothing
// that a kernel of the same step writes is read, before wait_for_previous().
//
// Shapes are compile-time constants: HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN, EXPERTS, USED.
#pragma once
#include "copy.cuh"
#include "tiles.cuh"

#ifndef EMULATED
#undef KERNEL
#define KERNEL(threads) extern "C" __global__ void __launch_bounds__(threads, 2)
#endif

constexpr int BLOCK = 512, WARPS = BLOCK / WARP;
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

// Where the time of a step goes: with TIMELINE defined as the address of a buffer, the first block of
// each kernel notes there when it passed a point (nanoseconds, of the last layer).
#ifdef TIMELINE
DEV void mark(int kernel, int point) {
    if (threadIdx.x || blockIdx.x || blockIdx.y) return;
    unsigned long long now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now)::"memory");
    reinterpret_cast<unsigned long long*>(TIMELINE)[kernel * 10 + point] = now;
}
#else
DEV void mark(int, int) {}
#endif

// What the step works on; it stays put in memory, so that one graph serves every step.
struct Step {
    int token, position;
    int not_finite;  // 1 when a logit was NaN or infinite
    int done;        // blocks of the head kernel that have ended
    int number;      // of the step, never 0; no two steps have the same
};

// RMS norm of x into `normed` (shared), section 5. The block's first half adds up; both halves then
// write every other superblock.
struct Norm {
    float weight[(HIDDEN_SUPERS + 1) / 2];  // fetched ahead
    int column, half;

    DEV Norm(const float* norm) : column(threadIdx.x % SUPER), half(threadIdx.x / SUPER) {
#pragma unroll
        for (int i = 0; i < HIDDEN_SUPERS; i += 2)
            if (i + half < HIDDEN_SUPERS) weight[i / 2] = norm[(i + half) * SUPER + column];
    }
    DEV void run(const float* x, float eps, float* normed, float* buffer) {
        float v[HIDDEN_SUPERS], sum = 0.0f;
#pragma unroll
        for (int i = 0; i < HIDDEN_SUPERS; i++)
            if (half == 0 || i % 2) v[i] = x[i * SUPER + column];
        if (half == 0) {
#pragma unroll
            for (int i = 0; i < HIDDEN_SUPERS; i++) sum = add(sum, mul(v[i], v[i]));
            buffer[column] = sum;
        }
        __syncthreads();
        float mean = div(buffer_tree(buffer), float(HIDDEN));
        float r = div(1.0f, square_root(add(mean, eps)));
#pragma unroll
        for (int i = 0; i < HIDDEN_SUPERS; i++)
            if (i % 2 == half) normed[i * SUPER + column] = mul(mul(v[i], r), weight[i / 2]);
        __syncthreads();
    }
};

// A superblock of x (global or shared) in a warp: eight values a lane.
DEV void load_super(const float* x, float (&v)[8]) {
    const float4* from = reinterpret_cast<const float4*>(x) + 2 * lane_id();
    float4 a = from[0], b = from[1];
    v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w, v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
}
// Superblocks of x to acts (shared), a warp each. A barrier must follow.
DEV void quantise_supers(const float* x, int supers, Act* acts) {
    for (int s = warp_id(); s < supers; s += WARPS) {
        float v[8];
        load_super(x + s * SUPER, v);
        quantise_superblock(v, acts + s);
    }
}

// A block's tiles, four to a warp at a time (a step): eight lanes hold the eight rows of one. WHERE
// maps the number of a tile to its address and activation. The product of tile j and row r goes to
// part[8j + r]. Tiles come through slots in shared memory, DEPTH steps of each warp ahead.
template <class W, class Where, int DEPTH>
struct Products {
    static constexpr int SLOT = 4 * W::TILE_BYTES, ARRIVALS = WARPS * DEPTH * 8;
    // Of shared memory, for a block of so many tiles.
    DEV static int bytes(int tiles) { return ARRIVALS + min((tiles + 3) / 4, DEPTH * WARPS) * SLOT; }

    const Where& where;
    uint8* memory;
    int tiles, turn, fetched = 0;  // the warp's turn, 0 … WARPS-1; its steps fetched so far

    DEV Products(const Where& where, uint8* memory, int tiles, int turn)
        : where(where), memory(memory), tiles(tiles), turn(turn) {
#ifdef BULK_COPIES
        if (lane_id() < DEPTH) arrival_init(arrival(lane_id()));
        __syncwarp();
#endif
    }
    DEV void start() {
        for (int i = 0; i < DEPTH; i++) fetch();
    }
    DEV void run(const Act* acts, float* part) {
        for (int step = 0; first_of(step) < tiles; step++) {
            wait(step);
            int sub = lane_id() / TILE_ROWS, row = lane_id() % TILE_ROWS, j = first_of(step) + sub;
            if (j < tiles) {
                W w;
                w.load_shared(slot(step) + sub * W::TILE_BYTES, row);
                const Act& a = acts[where.act(j)];
                part[j * TILE_ROWS + row] = mul(a.d, w.dot(a));
            }
            __syncwarp();
            fetch();
        }
    }

   private:
    DEV int first_of(int step) const { return 4 * (step * WARPS + turn); }
    DEV uint8* slot(int step) const {
        return memory + ARRIVALS + (step % DEPTH * WARPS + turn) * SLOT;
    }
#ifdef BULK_COPIES
    DEV Arrival* arrival(int step) const {
        return reinterpret_cast<Arrival*>(memory) + turn * DEPTH + step % DEPTH;
    }
    DEV void fetch() {
        int step = fetched++, lane = lane_id(), n = min(4, tiles - first_of(step));
        if (n <= 0) return;
        if (lane == 0) arrival_expect(arrival(step), n * W::TILE_BYTES);
        __syncwarp();
        if (lane < n)
            copy_bulk(slot(step) + lane * W::TILE_BYTES, where.tile(first_of(step) + lane),
                      W::TILE_BYTES, arrival(step));
    }
    DEV void wait(int step) const { arrival_wait(arrival(step), step / DEPTH); }
#else
    DEV void fetch() {
        int step = fetched++, n = min(4, tiles - first_of(step));
        for (int t = 0; t < n; t++) {
            const uint8* from = where.tile(first_of(step) + t);
            for (int i = 16 * lane_id(); i < W::TILE_BYTES; i += 16 * WARP)
                copy_async(slot(step) + t * W::TILE_BYTES + i, from + i);
        }
        commit_copies();
    }
    DEV void wait(int) const {
        wait_copies<DEPTH - 1>();
        __syncwarp();
    }
#endif
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
