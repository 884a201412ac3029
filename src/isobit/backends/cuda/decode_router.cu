// A decode step: the router. ROUTER_KIND: its float kind.
#include "decode.cuh"
#include "formats.cuh"

// Norm; logits of the router, an expert a block; the quantised activations, a superblock a block.
struct RouterShared {
    __align__(16) float normed[HIDDEN];
    float buffer[2][SUPER];
};
KERNEL(512) decode_router(const float* x, const float* norm, float eps, const uint8* w,
                          float* logits, Act* acts) {
    DYNAMIC_SHARED(RouterShared, sh);
    mark(2, 0);
    float row[HIDDEN_SUPERS] = {};
    int expert = blockIdx.x;
    if (expert < EXPERTS && threadIdx.x < SUPER)
#pragma unroll
        for (int i = 0; i < HIDDEN_SUPERS; i++)
            row[i] = load_float(w, int64(expert) * HIDDEN + i * SUPER + threadIdx.x, ROUTER_KIND);
    Norm h(norm);
    let_next_start();
    wait_for_previous();
    mark(2, 1);
    h.run(x, eps, sh->normed, sh->buffer[0]);
    if (threadIdx.x < SUPER) {
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < HIDDEN_SUPERS; i++)
            sum = add(sum, mul(row[i], sh->normed[i * SUPER + threadIdx.x]));
        sh->buffer[1][threadIdx.x] = sum;
    } else if (warp_id() == SUPER / WARP) {
        for (int s = blockIdx.x; s < HIDDEN_SUPERS; s += gridDim.x) {
            float v[8];
            load_super(sh->normed + s * SUPER, v);
            quantise_without_digits(v, acts + s);
        }
    }
    __syncthreads();
    if (warp_id() == 0) {
        float z = buffer_tree(sh->buffer[1]);
        if (threadIdx.x == 0 && expert < EXPERTS) logits[expert] = z;
    }
    mark(2, 3);
}
