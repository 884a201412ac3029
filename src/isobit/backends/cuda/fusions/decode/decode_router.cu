// A decode step: the router. ROUTER_KIND: its float kind. With SHARED_KIND a shared expert's gate is one more expert.
// OF_HALF: experts of half a block, at most.
#include "decode.cuh"
#include "formats.cuh"

#ifdef SHARED_KIND
constexpr int OUTPUTS = EXPERTS + 1;
#else
constexpr int OUTPUTS = EXPERTS;
#endif
constexpr int HALVES = BLOCK / SUPER;

struct RouterShared {
    float squares[SUPER], products[OF_HALF * HALVES][SUPER];  // sums of a column
    WholeRows<1> whole;
};
// The norm of the block's row (Share); logits of the router, an expert half a block at a time; the quantised activations,
// a superblock a warp.
KERNEL(512) decode_router(float* x, const float* norm, float eps, const uint8* w, const uint8* shared_gate,
                          float* logits, ActivationBlock* acts, const uint64* exchanges, int received) {
    DYNAMIC_SHARED(RouterShared, sh);
    mark(2, 0);
    Share share;
    int half = threadIdx.x / SUPER, at = threadIdx.x % SUPER;
    auto expert = [&](int n) { return share.block + n * share.blocks; };  // the block's n-th
    float weight[HIDDEN_SUPERS], row[OF_HALF][HIDDEN_SUPERS], column[HIDDEN_SUPERS];
    if (expert(half) < OUTPUTS) {
#pragma unroll
        for (int i = 0; i < HIDDEN_SUPERS; i++) weight[i] = norm[i * SUPER + at];
#pragma unroll
        for (int n = 0; n < OF_HALF; n++) {
            int e = expert(n * HALVES + half);
#pragma unroll
            for (int i = 0; i < HIDDEN_SUPERS; i++) {
                int k = i * SUPER + at;
#ifdef SHARED_KIND
                if (e == EXPERTS) row[n][i] = load_float(shared_gate, k, SHARED_KIND);
                else
#endif
                    row[n][i] = e < OUTPUTS ? load_float(w, int64(e) * HIDDEN + k, ROUTER_KIND) : 0.0f;
            }
        }
    }
    Exchange<Cut> exchange(exchanges, received);
    let_next_start();
    wait_for_previous();
    mark(2, 1);
    const float* own = whole_rows(exchange, x, share.row, sh->whole, share.block == 0);
    if (half == 0 || expert(half) < OUTPUTS)
#pragma unroll
        for (int i = 0; i < HIDDEN_SUPERS; i++) column[i] = own[i * SUPER + at];
    if (half == 0) {
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < HIDDEN_SUPERS; i++) sum = add(sum, mul(column[i], column[i]));
        sh->squares[at] = sum;
    }
    __syncthreads();
    float r = norm_factor(sh->squares, eps);
#pragma unroll
    for (int n = 0; n < OF_HALF; n++) {
        if (expert(n * HALVES + half) >= OUTPUTS) continue;
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < HIDDEN_SUPERS; i++)
            sum = add(sum, mul(row[n][i], mul(mul(column[i], r), weight[i])));
        sh->products[n * HALVES + half][at] = sum;
    }
    for (int s = expert(WARPS - 1 - warp_id()); s < HIDDEN_SUPERS; s += WARPS * share.blocks) {
        float v[8], of[8];
        load_super(own + s * SUPER, v);
        load_super(norm + s * SUPER, of);
#pragma unroll
        for (int k = 0; k < 8; k++) v[k] = mul(mul(v[k], r), of[k]);
        quantise_without_digits(v, acts + share.row * HIDDEN_SUPERS + s);
    }
    __syncthreads();
    for (int n = warp_id(); n < OF_HALF * HALVES && expert(n) < OUTPUTS; n += WARPS) {
        float z = buffer_tree(sh->products[n]);
        if (lane_id() == 0) logits[share.row * OUTPUTS + expert(n)] = z;
    }
    mark(2, 3);
}
