// The weighted sum of a token's experts (docs/numerics.md, section 7).
#include "mirrors.cuh"

// out = ((0 + w_1 * y_1) + w_2 * y_2) + …, rows of `stride` values; a token a block.
KERNEL(THREADS) combine(const float* weights, const float* y, int k, int n, float* out, int stride,
                        const uint64* exchanges) {
    Mirrors mirrors(exchanges);
    begin();
    int64 token = blockIdx.x;
    for (int i = threadIdx.x; i < n; i += THREADS) {
        float sum = 0.0f;
        for (int r = 0; r < k; r++)
            sum = add(sum, mul(weights[token * k + r], y[(token * k + r) * n + i]));
        mirrors.store(out + token * stride + i, sum);
    }
}
