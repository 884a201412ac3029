// A decode step: the router. ROUTER_KIND: its float kind. With SHARED_KIND a shared expert's gate is one more expert.
#include "decode.cuh"
#include "formats.cuh"

#ifdef SHARED_KIND
constexpr int OUTPUTS = EXPERTS + 1;
#else
constexpr int OUTPUTS = EXPERTS;
#endif
#ifdef TWO  // experts of a block, one of each half
constexpr bool BOTH = true;
#else
constexpr bool BOTH = false;
#endif

// Norm; logits of the router, an expert a block, or two; the quantised activations, a superblock a block.
struct RouterShared {
    float buffer[2 + BOTH][ROWS * SUPER];
    WholeRows whole;
};
KERNEL(512) decode_router(float* x, const float* norm, float eps, const uint8* w, const uint8* shared_gate,
                          float* logits, ActivationBlock* acts, const uint64* exchanges, int received) {
    DYNAMIC_SHARED(RouterShared, sh);
    mark(2, 0);
    int expert = BOTH ? 2 * blockIdx.x + threadIdx.x / SUPER : blockIdx.x;
    float weight[HIDDEN_SUPERS] = {}, row[HIDDEN_SUPERS] = {};  // of a column
    if (expert < OUTPUTS && (BOTH || Norm::added(0) < ROWS))
#pragma unroll
        for (int i = 0; i < HIDDEN_SUPERS; i++) {
            int at = i * SUPER + threadIdx.x % SUPER;
            weight[i] = norm[at];
#ifdef SHARED_KIND
            if (expert == EXPERTS) row[i] = load_float(shared_gate, at, SHARED_KIND);
            else
#endif
                row[i] = load_float(w, int64(expert) * HIDDEN + at, ROUTER_KIND);
        }
    Norm h(norm);
    Exchange<Cut> exchange(exchanges, received);
    let_next_start();
    wait_for_previous();
    mark(2, 1);
    h.run<true, BOTH>(
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
    if (warp_id() < ROWS + BOTH) {
        float z = buffer_tree(sh->buffer[1] + warp_id() * SUPER);
        expert = BOTH ? 2 * blockIdx.x + warp_id() : expert;
        if (lane_id() == 0 && expert < OUTPUTS) logits[(BOTH ? 0 : warp_id() * OUTPUTS) + expert] = z;
    }
    mark(2, 3);
}
