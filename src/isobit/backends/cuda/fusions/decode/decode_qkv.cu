// A decode step: the projections of attention. QK_WEIGHT, V_WEIGHT: structs of tiles.cuh.
#include "products.cuh"

// Norm, quantisation and the products with W_q, W_k, W_v.
struct QueryKey {
    const uint8 *q, *k;
    static constexpr int Q_GROUPS = HEADS * HEAD_DIM / TILE_ROWS;
    static constexpr int GROUPS = Q_GROUPS + KV_HEADS * HEAD_DIM / TILE_ROWS;
    DEV int group(int unit) const { return blockIdx.x + unit * gridDim.x; }
    DEV const uint8* tile(int j) const {
        int g = group(j / HIDDEN_SUPERS), s = j % HIDDEN_SUPERS;
        const uint8* matrix = g < Q_GROUPS ? q : k;
        if (g >= Q_GROUPS) g -= Q_GROUPS;
        return matrix + (int64(g) * HIDDEN_SUPERS + s) * QK_WEIGHT::TILE_BYTES;
    }
    DEV int act(int j) const { return j % HIDDEN_SUPERS; }
};
struct Value {
    const uint8* v;
    static constexpr int GROUPS = KV_HEADS * HEAD_DIM / TILE_ROWS;
    // Dealt on from where the groups of q and k ended, so that no block gets one more of both.
    DEV int first_group() const { return (blockIdx.x + gridDim.x - QueryKey::GROUPS % gridDim.x) % gridDim.x; }
    DEV int count() const { return (GROUPS - first_group() + int(gridDim.x) - 1) / int(gridDim.x); }
    DEV int group(int unit) const { return first_group() + unit * gridDim.x; }
    DEV const uint8* tile(int j) const {
        return v + (int64(group(j / HIDDEN_SUPERS)) * HIDDEN_SUPERS + j % HIDDEN_SUPERS) *
                       V_WEIGHT::TILE_BYTES;
    }
    DEV int act(int j) const { return j % HIDDEN_SUPERS; }
};
struct QkvShared {
    ActivationBlock x[ROWS * HIDDEN_SUPERS];
    float buffer[ROWS * SUPER];
    WholeRows whole;
    __align__(16) uint8 tail[16];
};
// prediction: see expert_prefetch.cuh; its first word says that x is there.
KERNEL(512) decode_qkv(float* x, const float* norm, float eps, const uint8* q, const uint8* k,
                       const uint8* v, const int* step_number, uint64* prediction, float* qkv,
                       const uint64* exchanges, int received) {
    mark(0, 0);
    DYNAMIC_SHARED(QkvShared, sh);
    QueryKey qk = {q, k};
    Value value = {v};
    int n = dealt(QueryKey::GROUPS), nv = value.count();
    using First = Products<QK_WEIGHT, QueryKey, QK_DEPTH>;
    using Second = Products<V_WEIGHT, Value, V_DEPTH>;
    uint8* more = sh->tail + First::bytes(n * HIDDEN_SUPERS);
    First first(qk, sh->tail, n * HIDDEN_SUPERS, warp_id());
    Second second(value, more, nv * HIDDEN_SUPERS, WARPS - 1 - warp_id());
    first.start();
    second.start();
    Norm h(norm);
    Exchange<Cut> exchange(exchanges, received);
    float* part = reinterpret_cast<float*>(more + Second::bytes(nv * HIDDEN_SUPERS));
    int number = *step_number;
    let_next_start();
    wait_for_previous();
    mark(0, 1);
    const float* row = whole_rows(exchange, x, sh->whole, blockIdx.x == 0);
    if (blockIdx.x == 0 && threadIdx.x == BLOCK - 1) store_relaxed(prediction, packed(number, 0, 0.0f));
    h.quantise(row, eps, sh->buffer, sh->x);
    __syncthreads();
    mark(0, 2);
    int parts = (n + nv) * HIDDEN_SUPERS * TILE_ROWS;  // of a token
    first.run(sh->x, part, HIDDEN_SUPERS, parts);
    second.run(sh->x, part + n * HIDDEN_SUPERS * TILE_ROWS, HIDDEN_SUPERS, parts);
    __syncthreads();
    mark(0, 3);
#pragma unroll 1
    for (int i = threadIdx.x; i < ROWS * (n + nv) * TILE_ROWS; i += BLOCK) {
        int unit = i / TILE_ROWS, row = i % TILE_ROWS, r = ROWS == 1 ? 0 : unit / (n + nv);
        unit -= r * (n + nv);
        int group = unit < n ? qk.group(unit) : QueryKey::GROUPS + value.group(unit - n);
        qkv[(r * (QueryKey::GROUPS + Value::GROUPS) + group) * TILE_ROWS + row] =
            sum_supers<HIDDEN_SUPERS>(part + r * parts + unit * HIDDEN_SUPERS * TILE_ROWS + row);
    }
    mark(0, 5);
}
