// L2 norm of head vectors (docs/numerics.md, section 12).
#include "views.cuh"

// A vector of n values a block.
KERNEL(THREADS) l2_norm(const float* x, int64 stride, int step, int per_row, float eps, float scale,
                        int n, float* y) {
    begin();
    __shared__ float buffer[SUPER];
    x = View{x, stride, step, per_row}.vector(blockIdx.x);
    y += int64(blockIdx.x) * n;
    float sum = 0.0f;
    for (int i = threadIdx.x; i < n; i += THREADS) sum = add(sum, mul(x[i], x[i]));
    float r = div(1.0f, square_root(add(block_tree(sum, buffer), eps)));
    for (int i = threadIdx.x; i < n; i += THREADS) y[i] = mul(mul(x[i], r), scale);
}
