// RMS norm (docs/numerics.md, section 5).
#include "views.cuh"

// A vector of n values a block.
KERNEL(THREADS) rms_norm(const float* x, int64 stride, int step, int per_row, const float* weight,
                         float eps, int n, float* y) {
    begin();
    __shared__ float buffer[SUPER];
    x = View{x, stride, step, per_row}.vector(blockIdx.x);
    y += int64(blockIdx.x) * n;
    float sum = 0.0f;
    for (int i = threadIdx.x; i < n; i += THREADS) sum = add(sum, mul(x[i], x[i]));
    float mean = div(block_tree(sum, buffer), float(n));
    float r = div(1.0f, square_root(add(mean, eps)));
    for (int i = threadIdx.x; i < n; i += THREADS) y[i] = mul(mul(x[i], r), weight[i]);
}
