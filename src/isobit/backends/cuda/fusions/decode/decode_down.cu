// A decode step: the second half of the feed-forward. WEIGHT: a struct of tiles.cuh.
#include "products.cuh"

// The tiles of W_down for the chosen experts: a unit is the same 8 rows of each.
struct Down {
    const uint8* w;
    const int* id;
    static constexpr int GROUPS = MADE / TILE_ROWS, PER_UNIT = USED * FFN_SUPERS;
    static constexpr int64 MATRIX = int64(GROUPS) * FFN_SUPERS * WEIGHT::TILE_BYTES;
    DEV const uint8* tile(int j) const {
        int group = blockIdx.x + j / PER_UNIT * gridDim.x;
        return w + id[j / FFN_SUPERS % USED] * MATRIX +
               (int64(group) * FFN_SUPERS + j % FFN_SUPERS) * WEIGHT::TILE_BYTES;
    }
    DEV int act(int j) const { return j % PER_UNIT; }
};

// W_down of the chosen experts, their weighted sum in rank order, and the residual, in place; x: from the first that
// this part makes.
struct DownShared {
    ActivationBlock x[USED * FFN_SUPERS];
    int id[USED];
    float weight[USED];
    __align__(16) uint8 tail[16];
};
KERNEL(512) decode_down(const float* y, const int* step_number, const uint64* chosen,
                        const uint8* w, float* x, const uint64* exchanges, int received, int sent) {
    DYNAMIC_SHARED(DownShared, sh);
    mark(4, 0);
    Down where = {w, sh->id};
    int n = dealt(Down::GROUPS);
    using Tiles = Products<WEIGHT, Down, DEPTH>;
    Tiles products(where, sh->tail, n * Down::PER_UNIT, warp_id());
    float* all = reinterpret_cast<float*>(sh->tail + Tiles::bytes(n * Down::PER_UNIT));
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
    quantise_vectors<FFN_SUPERS>(y, USED, exchange, sh->x);
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
        int unit = i / TILE_ROWS, row = i % TILE_ROWS;
        const float* part = all + unit * Down::PER_UNIT * TILE_ROWS + row;
        float sum = 0.0f;
#if EXPERTS
#pragma unroll
        for (int r = 0; r < USED; r++)
            sum = add(sum, mul(sh->weight[r], sum_supers<FFN_SUPERS>(part + r * FFN_SUPERS * TILE_ROWS)));
#else
        sum = sum_supers<FFN_SUPERS>(part);
#endif
        int at = (blockIdx.x + unit * gridDim.x) * TILE_ROWS + row;
        sum = add(i < BLOCK ? before : x[at], sum);
        x[at] = sum;
        to.send(to.first + at, sum);
    }
    mark(4, 5);
}
