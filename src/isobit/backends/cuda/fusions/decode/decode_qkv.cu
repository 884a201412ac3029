// A decode step: the projections of attention, or of a delta net. QK_WEIGHT, V_WEIGHT: structs of tiles.cuh.
// Q_ROWS, K_ROWS, V_ROWS: of the matrices. With TAPS the rows of q are channels of a causal convolution, with SiLU.
#include "products.cuh"
#include "sequence_chunks.cuh"

#ifndef Q_ROWS
#define Q_ROWS (HEADS * HEAD_DIM)
#define K_ROWS (KV_HEADS * HEAD_DIM)
#define V_ROWS K_ROWS
#endif

// Norm, quantisation and the products with W_q, W_k, W_v.
struct QueryKey {
    const uint8 *q, *k;
    static constexpr int Q_GROUPS = Q_ROWS / TILE_ROWS, GROUPS = Q_GROUPS + K_ROWS / TILE_ROWS;
    DEV int group(int row_block) const { return blockIdx.x + row_block * gridDim.x; }
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
    static constexpr int GROUPS = V_ROWS / TILE_ROWS;
    // Dealt on from where the groups of q and k ended, so that no block gets one more of both.
    DEV int first_group() const { return (blockIdx.x + gridDim.x - QueryKey::GROUPS % gridDim.x) % gridDim.x; }
    DEV int count() const { return (GROUPS - first_group() + int(gridDim.x) - 1) / int(gridDim.x); }
    DEV int group(int row_block) const { return first_group() + row_block * gridDim.x; }
    DEV const uint8* tile(int j) const {
        return v + (int64(group(j / HIDDEN_SUPERS)) * HIDDEN_SUPERS + j % HIDDEN_SUPERS) *
                       V_WEIGHT::TILE_BYTES;
    }
    DEV int act(int j) const { return j % HIDDEN_SUPERS; }
};

#ifdef TAPS
// A channel of the convolution (docs/numerics.md, section 12). Its last values are of the step before.
struct Channel {
    float w[TAPS], row[TAPS - 1];
    float* kept;

    DEV void fetch(int channel, const float* taps, float* state, bool begins) {
        kept = state + channel;
#pragma unroll
        for (int i = 0; i < TAPS; i++) w[i] = taps[channel * TAPS + i];
#pragma unroll
        for (int i = 0; i < TAPS - 1; i++) row[i] = begins ? 0.0f : kept[i * Q_ROWS];
    }
    DEV float next(float x) {
        float sum = mul(row[0], w[0]);
#pragma unroll
        for (int i = 1; i < TAPS - 1; i++) sum = add(sum, mul(row[i], w[i]));
        sum = add(sum, mul(x, w[TAPS - 1]));
#pragma unroll
        for (int i = 1; i < TAPS - 1; i++) kept[(i - 1) * Q_ROWS] = row[i];
        kept[(TAPS - 2) * Q_ROWS] = x;
        return div(sum, add(1.0f, isobit::exp(-sum)));
    }
};
#endif

struct QkvShared {
    ActivationBlock x[ROWS * HIDDEN_SUPERS];
    float buffer[ROWS * SUPER];
    WholeRows<ROWS> whole;
    __align__(LINE) uint8 tail[16];
};
// prediction: see expert_prefetch.cuh; its first word says that x is there.
KERNEL(512) decode_qkv(float* x, const float* norm, float eps, const uint8* q, const uint8* k,
                       const uint8* v, const int* step_number, uint64* prediction, float* qkv,
                       const float* taps, const SequenceChunk* chunks, const int* positions, float* state,
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
    // Of the thread's row i of the block's: its place.
    auto place = [&](int i) {
        int row_block = i / TILE_ROWS;
        int group = row_block < n ? qk.group(row_block) : QueryKey::GROUPS + value.group(row_block - n);
        return group * TILE_ROWS + i % TILE_ROWS;
    };
#ifdef TAPS
    state += int64(chunks->state) * (TAPS - 1) * Q_ROWS;
    bool begins = *positions == 0;
    Channel channel;
    if (threadIdx.x < n * TILE_ROWS) channel.fetch(place(threadIdx.x), taps, state, begins);
#endif
    h.find(x);
    let_next_start();
    wait_for_previous();
    mark(0, 1);
    const float* row = whole_rows(exchange, x, 0, sh->whole, blockIdx.x == 0);
    if (blockIdx.x == 0 && threadIdx.x == BLOCK - 1) store_relaxed(prediction, packed(number, 0, 0.0f));
    if (row != x) h.find(row);
    h.quantise(eps, sh->buffer, sh->x);
    __syncthreads();
    mark(0, 2);
    int parts = (n + nv) * HIDDEN_SUPERS * TILE_ROWS;  // of a token
    first.run(sh->x, part, HIDDEN_SUPERS, parts);
    second.run(sh->x, part + n * HIDDEN_SUPERS * TILE_ROWS, HIDDEN_SUPERS, parts);
    __syncthreads();
    mark(0, 3);
#pragma unroll 1
    for (int i = threadIdx.x; i < ROWS * (n + nv) * TILE_ROWS; i += BLOCK) {
        int row_block = i / TILE_ROWS, row = i % TILE_ROWS, r = ROWS == 1 ? 0 : row_block / (n + nv);
        row_block -= r * (n + nv);
        float y = sum_supers<HIDDEN_SUPERS>(part + r * parts + row_block * HIDDEN_SUPERS * TILE_ROWS + row);
        int at = place(row_block * TILE_ROWS + row);
#ifdef TAPS
        if (i >= BLOCK && row_block < n) channel.fetch(at, taps, state, begins);
        if (row_block < n) y = channel.next(y);
#endif
        qkv[r * (QueryKey::GROUPS + Value::GROUPS) * TILE_ROWS + at] = y;
    }
    mark(0, 5);
}
