// A decode step: the router. ROUTER_KIND: its float kind.
#include "decode.cuh"
#include "formats.cuh"

// Norm; logits of the router, an expert a block; the quantised activations, a superblock a block.
struct RouterShared {
    float buffer[2][ROWS * SUPER];
    WholeRows whole;
};
KERNEL(512) decode_router(float* x, const float* norm, float eps, const uint8* w,
                          float* logits, ActivationBlock* acts, const uint64* exchanges, int received) {
    DYNAMIC_SHARED(RouterShared, sh);
    mark(2, 0);
    int expert = blockIdx.x;
    float weight[HIDDEN_SUPERS] = {}, row[HIDDEN_SUPERS] = {};  // of a column
    if (expert < EXPERTS && Norm::added(0) < ROWS)
#pragma unroll
        for (int i = 0; i < HIDDEN_SUPERS; i++) {
            int at = i * SUPER + threadIdx.x % SUPER;
            weight[i] = norm[at];
            row[i] = load_float(w, int64(expert) * HIDDEN + at, ROUTER_KIND);
        }
    Norm h(norm);
    Exchange<Cut> exchange(exchanges, received);
    let_next_start();
    wait_for_previous();
    mark(2, 1);
    h.run<true>(
        whole_rows(exchange, x, sh->whole, blockIdx.x == 0), eps, sh->buffer[0],
        [&](int token, const float (&column)[HIDDEN_SUPERS], float r) {
            float sum = 0.0f;
#pragma unroll
            for (int i = 0; i < HIDDEN_SUPERS; i++)
                sum = add(sum, mul(row[i], mul(mul(column[i], r), weight[i])));
            sh->buffer[1][token * SUPER + threadIdx.x % SUPER] = sum;
        },
        [&](int s, const float (&values)[8]) {
            if (s % gridDim.x == blockIdx.x) quantise_without_digits(values, acts + s);
        });
    __syncthreads();
    if (warp_id() < ROWS) {
        float z = buffer_tree(sh->buffer[1] + warp_id() * SUPER);
        if (lane_id() == 0 && expert < EXPERTS) logits[warp_id() * EXPERTS + expert] = z;
    }
    mark(2, 3);
}
