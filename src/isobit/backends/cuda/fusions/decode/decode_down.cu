// A decode step: the second half of the feed-forward. WEIGHT: a struct of tiles.cuh. SHARED: see decode_gate_up.cu.
#include "products.cuh"

#ifndef SHARED
#define SHARED 0
#endif
constexpr int SLOTS = USED + SHARED;

// The tiles of W_down for the chosen experts: a row block is the same 8 rows of each.
struct Down {
    const uint8 *w, *shared;
    const int* id;
    static constexpr int GROUPS = MADE / TILE_ROWS, PER_ROW_BLOCK = SLOTS * FFN_SUPERS;
    static constexpr int64 MATRIX = int64(GROUPS) * FFN_SUPERS * WEIGHT::TILE_BYTES;
    DEV const uint8* tile(int j) const {
        int group = blockIdx.x + j / PER_ROW_BLOCK * gridDim.x;
        int slot = j / FFN_SUPERS % SLOTS;
        return (SHARED && slot == USED ? shared : w + id[slot] * MATRIX) +
               (int64(group) * FFN_SUPERS + j % FFN_SUPERS) * WEIGHT::TILE_BYTES;
    }
    DEV int act(int j) const { return j % PER_ROW_BLOCK; }
};

// W_down of the chosen experts, their weighted sum in rank order, a shared one by the sigmoid of its gate, and the
// residual, in place; x: from the first that this part makes.
struct DownShared {
    ActivationBlock x[SLOTS * FFN_SUPERS];
    int id[USED];
    float weight[USED];
    __align__(16) uint8 tail[16];
};
KERNEL(512) decode_down(const float* y, const int* step_number, const uint64* chosen,
                        const uint8* w, const uint8* shared, const float* shared_gate, float* x,
                        const uint64* exchanges, int received, int sent) {
    DYNAMIC_SHARED(DownShared, sh);
    mark(4, 0);
    Down where = {w, shared, sh->id};
    int n = dealt(Down::GROUPS);
    using Tiles = Products<WEIGHT, Down, DEPTH>;
    Tiles products(where, sh->tail, n * Down::PER_ROW_BLOCK, warp_id());
    float* all = reinterpret_cast<float*>(sh->tail + Tiles::bytes(n * Down::PER_ROW_BLOCK));
    Exchange<Cut> exchange(exchanges, received);
    Exchange<SentCut> to(exchanges, sent);
    let_next_start();
#if EXPERTS
    // The experts are known long before the kernel ahead of this one ends.
    if (threadIdx.x < USED) {
        uint64 one;
        do one = load_relaxed(chosen + threadIdx.x);
        while (!is_of(one, *step_number));
        sh->id[threadIdx.x] = chosen_id(one);
        sh->weight[threadIdx.x] = chosen_weight(one);
    }
#else
    if (threadIdx.x == 0) sh->id[0] = 0;
#endif
    __syncthreads();
    mark(4, 4);
    products.start();
    wait_for_previous();
    mark(4, 1);
    if (n == 0) return;  // who reads what was sent also sends (exchange.cuh)
    quantise_vectors<FFN_SUPERS>(y, SLOTS, exchange, sh->x);
    float share = 0.0f;  // of the shared expert
    if (SHARED) share = sigmoid(*shared_gate);
    // Of the thread's first row, on its way while products are made; most threads have none.
    int mine = (blockIdx.x + threadIdx.x / TILE_ROWS * gridDim.x) * TILE_ROWS + threadIdx.x % TILE_ROWS;
    float before = threadIdx.x < n * TILE_ROWS ? x[mine] : 0.0f;
    __syncthreads();
    mark(4, 2);
    products.run(sh->x, all);
    __syncthreads();
    mark(4, 3);
#pragma unroll 1
    for (int i = threadIdx.x; i < n * TILE_ROWS; i += BLOCK) {
        int row_block = i / TILE_ROWS, row = i % TILE_ROWS;
        const float* part = all + row_block * Down::PER_ROW_BLOCK * TILE_ROWS + row;
        float sum = 0.0f;
#if EXPERTS
#pragma unroll
        for (int r = 0; r < USED; r++)
            sum = add(sum, mul(sh->weight[r], sum_supers<FFN_SUPERS>(part + r * FFN_SUPERS * TILE_ROWS)));
        if (SHARED) sum = add(sum, mul(share, sum_supers<FFN_SUPERS>(part + USED * FFN_SUPERS * TILE_ROWS)));
#else
        sum = sum_supers<FFN_SUPERS>(part);
#endif
        int at = (blockIdx.x + row_block * gridDim.x) * TILE_ROWS + row;
        sum = add(i < BLOCK ? before : x[at], sum);
        x[at] = sum;
        to.send(to.first + at, sum);
    }
    mark(4, 5);
}
