// A decode step of several rows: the second half of the feed-forward, as decode_down.cu does it for one.
// WEIGHT: a struct of tiles.cuh.
#include "expert_slots.cuh"
#include "products.cuh"

#if !EXPERTS
constexpr int PAIRS = ROWS;
#endif
// The tiles of W_down for the experts in their slots: a unit is the same 8 rows of each.
struct Down {
    const uint8* w;
    const int* expert;  // of a slot
    int per_unit;
    static constexpr int GROUPS = MADE / TILE_ROWS;
    static constexpr int64 MATRIX = int64(GROUPS) * FFN_SUPERS * WEIGHT::TILE_BYTES;
    DEV int unit(int j) const { return j / per_unit; }
    DEV int slot(int j) const { return (j - unit(j) * per_unit) / FFN_SUPERS; }
    DEV int act(int j) const { return j % FFN_SUPERS; }
    DEV const uint8* tile(int j) const {
        int group = blockIdx.x + unit(j) * gridDim.x;
        return w + expert[slot(j)] * MATRIX + (int64(group) * FFN_SUPERS + act(j)) * WEIGHT::TILE_BYTES;
    }
};

// W_down of the chosen experts, their weighted sum in rank order, and the residual, in place.
struct DownShared {
    ActivationBlock x[PAIRS * FFN_SUPERS];
#if EXPERTS
    ExpertSlots slots;
    int id[PAIRS];
    float weight[PAIRS];
#else
    int expert[1];
#endif
    __align__(16) uint8 tail[16];
};
KERNEL(512) rows_down(const float* y, const int* step_number, const uint64* chosen, const uint8* w,
                      float* x, const uint64* exchanges, int received, int sent) {
    DYNAMIC_SHARED(DownShared, sh);
    mark(4, 0);
    using Tiles = Products<WEIGHT, Down, DEPTH>;
    constexpr int PART = FFN_SUPERS * TILE_ROWS;  // products of a pair, or a row, and a group
    int n = dealt(Down::GROUPS), experts = 1;
    Exchange<Cut> exchange(exchanges, received);
    Exchange<SentCut> to(exchanges, sent);
    let_next_start();
#if EXPERTS
    ExpertSlots* slots = &sh->slots;
    clear_wanted(slots);
    // The experts are known long before the kernel ahead of this one ends.
    uint64 one = 0;
    if (threadIdx.x < PAIRS) {
        int number = *step_number;
        do one = load_relaxed(chosen + threadIdx.x);
        while (!is_of(one, number));
        sh->id[threadIdx.x] = chosen_id(one);
        sh->weight[threadIdx.x] = chosen_weight(one);
    }
    __syncthreads();
    if (threadIdx.x < PAIRS) slots->wanted[chosen_id(one)] = true;
    __syncthreads();
    assign_slots(slots);
    __syncthreads();
    experts = slots->count;
    const int* expert = slots->expert;
#else
    if (threadIdx.x == 0) sh->expert[0] = 0;
    const int* expert = sh->expert;
    __syncthreads();
#endif
    Down where = {w, expert, experts * FFN_SUPERS};
    Tiles products(where, sh->tail, n * where.per_unit, warp_id());
    constexpr int MOST = EXPERTS ? PAIRS : 1;
    float* all = reinterpret_cast<float*>(sh->tail + Tiles::bytes(n * MOST * FFN_SUPERS));
    mark(4, 4);
    products.start();
#if EXPERTS
    rank_slots(slots, [&](int pair) { return sh->id[pair]; });
#endif
    wait_for_previous();
    mark(4, 1);
    quantise_vectors<FFN_SUPERS>(y, PAIRS, exchange, sh->x);
    // Of the thread's first row, on its way while products are made; most threads have none.
    float before = threadIdx.x < ROWS * n * TILE_ROWS ? x[own_row(threadIdx.x, n)] : 0.0f;
    __syncthreads();
    mark(4, 2);
#if EXPERTS
    products.run_each([&](int j, const uint8* tile, int row) {
        int slot = where.slot(j), k = where.act(j);
        float* part = all + where.unit(j) * PAIRS * PART + k * TILE_ROWS + row;
#pragma unroll 1
        for (int r = 0; r < ROWS; r++) {
            int rank = slots->rank[slot][r];
            if (rank < 0) continue;
            const ActivationBlock* a = sh->x + (r * USED + rank) * FFN_SUPERS + k;
            float t[1];
            WEIGHT::dots_shared<1>(tile, row, a, 0, t);
            part[(r * USED + rank) * PART] = mul(a->d, t[0]);
        }
    });
#else
    products.run(sh->x, all, FFN_SUPERS, n * PART);
#endif
    __syncthreads();
    mark(4, 3);
#pragma unroll 1
    for (int i = threadIdx.x; i < ROWS * n * TILE_ROWS; i += BLOCK) {
        int row = i % TILE_ROWS, r = i / TILE_ROWS / n, unit = i / TILE_ROWS - r * n;
        float sum = 0.0f;
#if EXPERTS
        const float* part = all + (unit * PAIRS + r * USED) * PART + row;
#pragma unroll
        for (int rank = 0; rank < USED; rank++)
            sum = add(sum, mul(sh->weight[r * USED + rank], sum_supers<FFN_SUPERS>(part + rank * PART)));
#else
        sum = sum_supers<FFN_SUPERS>(all + (r * n + unit) * PART + row);
#endif
        int at = own_row(i, n);
        sum = add(i < BLOCK ? before : x[at], sum);
        x[at] = sum;
        to.send(to.first + at, sum);
    }
    mark(4, 5);
}
