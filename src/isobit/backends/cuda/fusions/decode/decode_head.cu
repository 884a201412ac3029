// A decode step: the output product, and the most likely token. WEIGHT: a struct of tiles.cuh.
#include "products.cuh"
#include "argmax.cuh"

// Final norm, output product, and the largest logit, the lower index among equals. The last block to
// end sets up the next step.
struct Output {
    const uint8* w;
    DEV const uint8* tile(int j) const {
        int group = blockIdx.x + j / HIDDEN_SUPERS * gridDim.x;
        return w + (int64(group) * HIDDEN_SUPERS + j % HIDDEN_SUPERS) * WEIGHT::TILE_BYTES;
    }
    DEV int act(int j) const { return j % HIDDEN_SUPERS; }
};
struct OutputShared {
    ActivationBlock x[HIDDEN_SUPERS];
    float buffer[SUPER];
    uint64 best[WARPS];
    int last;
    __align__(LINE) uint8 tail[16];
};
KERNEL(512) decode_head(const float* x, const float* norm, float eps, const uint8* w, int rows,
                            float* logits, uint64* best, Step* step, int* generated) {
    mark(5, 0);
    DYNAMIC_SHARED(OutputShared, sh);
    Output where = {w};
    int n = dealt(rows / TILE_ROWS);
    using Tiles = Products<WEIGHT, Output, DEPTH>;
    Tiles products(where, sh->tail, n * HIDDEN_SUPERS, warp_id());
    float* part = reinterpret_cast<float*>(sh->tail + Tiles::bytes(n * HIDDEN_SUPERS));
    products.start();
    Norm h(norm);
    h.find(x);
    let_next_start();
    wait_for_previous();
    mark(5, 1);
    h.quantise(eps, sh->buffer, sh->x);
    __syncthreads();
    mark(5, 2);
    products.run(sh->x, part);
    __syncthreads();
    mark(5, 3);
    uint64 key = 0;
#pragma unroll 1
    for (int i = threadIdx.x; i < n * TILE_ROWS; i += BLOCK) {
        int at = (blockIdx.x + i / TILE_ROWS * gridDim.x) * TILE_ROWS + i % TILE_ROWS;
        float z = sum_supers<HIDDEN_SUPERS>(part + i / TILE_ROWS * HIDDEN_SUPERS * TILE_ROWS +
                                            i % TILE_ROWS);
        logits[at] = z;
        key = max(key, rank_key(z, at));
        if (magnitude(z) >= 0x7f800000u) step->not_finite = 1;
    }
    key = block_best<WARPS>(key, sh->best);
    if (threadIdx.x == 0) {
        best[blockIdx.x] = key;
        __threadfence();
        sh->last = atomicAdd(&step->done, 1) == int(gridDim.x) - 1;
    }
    __syncthreads();
    if (!sh->last) return;
    __threadfence();
    key = 0;
    for (int i = threadIdx.x; i < int(gridDim.x); i += BLOCK) key = max(key, load_fresh(best + i));
    __syncthreads();
    key = block_best<WARPS>(key, sh->best);
    if (threadIdx.x == 0) {
        int token = index_of(key);
        generated[step->position] = load_fresh(&step->not_finite) ? -1 : token;
        step->token = token;
        step->position++;
        step->done = 0;
        step->number++;
    }
}
