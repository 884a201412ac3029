// A decode step: the second half of the feed-forward. WEIGHT: a struct of tiles.cuh. Of several rows with experts each
// block takes one (Share). SHARED: see decode_gate_up.cu.
#include "products.cuh"

#ifndef SHARED
#define SHARED 0
#endif
constexpr int SLOTS = USED + SHARED;
constexpr int QUANTISING = WARPS * 3 / 4;  // warps; the others ask for weights

// The tiles of W_down for the chosen experts: a row block is the same 8 rows of each.
struct Down {
    const uint8 *w, *shared;
    const int* id;
    Share share;
    static constexpr int GROUPS = MADE / TILE_ROWS, PER_ROW_BLOCK = SLOTS * FFN_SUPERS;
    static constexpr int64 MATRIX = int64(GROUPS) * FFN_SUPERS * WEIGHT::TILE_BYTES;
    DEV const uint8* tile(int j) const {
        int group = share.block + j / PER_ROW_BLOCK * share.blocks;
        int slot = j / FFN_SUPERS % SLOTS;
        return (SHARED && slot == USED ? shared : w + id[slot] * MATRIX) +
               (int64(group) * FFN_SUPERS + j % FFN_SUPERS) * WEIGHT::TILE_BYTES;
    }
    DEV int act(int j) const { return j % PER_ROW_BLOCK; }
};

// W_down of the chosen experts, their weighted sum in rank order, a shared one by the sigmoid of its gate, and the
// residual, in place; x: from the first that this part makes.
struct DownShared {
    ActivationBlock x[ROWS_EACH * SLOTS * FFN_SUPERS];
    int id[USED];
    float weight[USED];
    __align__(LINE) uint8 tail[16];
};
KERNEL(512) decode_down(const float* y, const int* step_number, const uint64* chosen,
                        const uint8* w, const uint8* shared, const float* shared_gate, float* x,
                        const uint64* exchanges, int received, int sent) {
    DYNAMIC_SHARED(DownShared, sh);
    mark(4, 0);
    Share share;
    Down where = {w, shared, sh->id, share};
    int n = share.dealt(Down::GROUPS);
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
        do one = load_relaxed(chosen + share.row * USED + threadIdx.x);
        while (!is_of(one, *step_number));
        sh->id[threadIdx.x] = chosen_id(one);
        sh->weight[threadIdx.x] = chosen_weight(one);
    }
#else
    if (threadIdx.x == 0) sh->id[0] = 0;
#endif
    __syncthreads();
    mark(4, 4);
    products.start(QUANTISING, 1);
    const float* own = first_values<FFN_SUPERS>(y, share.row * SLOTS);
    wait_for_previous();
    mark(4, 1);
    if (n == 0) return;  // who reads what was sent also sends (exchange.cuh)
    quantise_vectors<FFN_SUPERS, QUANTISING>(y, own, share.row * SLOTS, ROWS_EACH * SLOTS, exchange, sh->x);
    products.start(QUANTISING);  // not before: y would come behind all of them
    float weight = 0.0f;  // of the shared expert
    if (SHARED) weight = sigmoid(*shared_gate);
    // Of the thread's first value, on its way while products are made; most threads have none.
    float before = threadIdx.x < ROWS_EACH * n * TILE_ROWS ? x[share.place(threadIdx.x, n)] : 0.0f;
    __syncthreads();
    mark(4, 2);
    constexpr int PART = Down::PER_ROW_BLOCK * TILE_ROWS;  // products of a row block
    products.run<ROWS_EACH>(sh->x, all, SLOTS * FFN_SUPERS, n * PART);
    __syncthreads();
    mark(4, 3);
#pragma unroll 1
    for (int i = threadIdx.x; i < ROWS_EACH * n * TILE_ROWS; i += BLOCK) {
        const float* part = all + i / TILE_ROWS * PART + i % TILE_ROWS;
        float sum = 0.0f;
#if EXPERTS
#pragma unroll
        for (int r = 0; r < USED; r++)
            sum = add(sum, mul(sh->weight[r], sum_supers<FFN_SUPERS>(part + r * FFN_SUPERS * TILE_ROWS)));
        if (SHARED) sum = add(sum, mul(weight, sum_supers<FFN_SUPERS>(part + USED * FFN_SUPERS * TILE_ROWS)));
#else
        sum = sum_supers<FFN_SUPERS>(part);
#endif
        int at = share.place(i, n);
        sum = add(i < BLOCK ? before : x[at], sum);
        x[at] = sum;
        to.send(to.first + at, sum);
    }
    mark(4, 5);
}
