// The experts of few tokens, chosen by every block for itself, and their gate, up and SwiGLU: see
// batch_matmul.cuh. So a step has no kernels between the router's product and this one.
#include "batch_matmul.cuh"
#include "router.cuh"

constexpr int EXPERTS = WARP * PARTS, PAIRS = 256;  // of at most 32 tokens

// What top_k.cu makes of logits, in shared memory; pairs in the same order.
struct Choice {
    int count;  // of groups
    int ids[PAIRS], order[PAIRS];
    float weights[PAIRS];
    uint32 tokens[EXPERTS];  // that chose it, a bit each
    int begin[EXPERTS];
    ItemGroup groups[PAIRS];

    DEV void clear() {
        for (int e = threadIdx.x; e < EXPERTS; e += BLOCK) tokens[e] = 0;
    }
    DEV void make(const Router& router, const float* z, int n) {
        const int k = router.k;
#pragma unroll 1
        for (int token = warp_id(); token < n; token += BATCH_WARPS) {
            router.choose(z + token * router.experts, nullptr, ids + token * k, weights + token * k);
            __syncwarp();
            for (int rank = lane_id(); rank < k; rank += WARP)
                atomicOr(tokens + ids[token * k + rank], 1u << token);
        }
        __syncthreads();
        if (warp_id() == 0) group();
        __syncthreads();
        for (int pair = threadIdx.x; pair < n * k; pair += BLOCK) {
            int e = ids[pair], token = pair / k;
            order[begin[e] + __popc(tokens[e] & (1u << token) - 1)] = pair;
        }
        __syncthreads();
    }
    // For the kernels behind.
    DEV void store(int pairs, int* to_ids, float* to_weights, int* to_order, ItemGroup* to_groups,
                   int* n_groups) const {
        for (int i = threadIdx.x; i < pairs; i += BLOCK) {
            to_ids[i] = ids[i], to_weights[i] = weights[i], to_order[i] = order[i];
            if (i < count) to_groups[i] = groups[i];
        }
        if (threadIdx.x == 0) *n_groups = count;
    }

   private:
    // A lane has PARTS experts in a row.
    DEV void group() {
        int pairs = 0, all = 0;
#pragma unroll
        for (int i = 0; i < PARTS; i++) {
            int n = __popc(tokens[PARTS * lane_id() + i]);
            pairs += n, all += (n + COLUMNS - 1) / COLUMNS;
        }
        int place = warp_scan(pairs) - pairs, to = warp_scan(all) - all;
        if (lane_id() == WARP - 1) count = to + all;
#pragma unroll
        for (int i = 0; i < PARTS; i++) {
            int e = PARTS * lane_id() + i, n = __popc(tokens[e]);
            begin[e] = place;
#pragma unroll 1
            for (int first = 0; first < n; first += COLUMNS)
                groups[to++] = {e, place + first, min(COLUMNS, n - first), 0};
            place += n;
        }
    }
};

KERNEL(BLOCK) routed_gate_up(const uint8* gate, const uint8* up, int64 matrix_bytes, int units, int supers,
                             const Input* x, const float* z, int tokens, int experts, int k,
                             int normalise, int softmax, const float* bias, int* ids,
                             float* weights, int* order, ItemGroup* groups, int* n_groups,
                             int* planned, float* y, int stride) {
    mark(MARK, 0);
    DYNAMIC_SHARED(ColumnAct, acts);
    uint8* memory = reinterpret_cast<uint8*>(acts + COLUMNS * supers);
    Choice& choice = *reinterpret_cast<Choice*>(memory + BATCH_WARPS * Stream<WEIGHT>::BYTES);
    Stream<WEIGHT> stream(gate, up, matrix_bytes, choice.groups, units, supers, memory);
    choice.clear();
    __syncthreads();
    wait_for_previous();
    mark(MARK, 5);
    if (blockIdx.x) let_next_start();
    choice.make({experts, k, normalise, softmax, bias, 1, 1}, z, tokens);
    Share share(int64(choice.count) * units, blockIdx.x, gridDim.x);
    stream.start(share.at + unit_offset(), share.end);
    mark(MARK, 1);
    if (blockIdx.x == 0) {
        choice.store(tokens * k, ids, weights, order, groups, n_groups);
        __syncthreads();
        if (threadIdx.x == 0) {
            store_release(planned, 1);  // so that the next kernel knows, which starts now
            let_next_start();
        }
    }
    float* parts = reinterpret_cast<float*>(&choice + 1);
    multiply_units(stream, share.at, share.end, x, choice.groups, {choice.order, k}, acts, parts, y, stride);
    mark(MARK, 4);
}
