// Scale (docs/numerics.md, section 5).
#include "views.cuh"

KERNEL(THREADS) scale(const float* x, int64 stride, int step, int per_row, int n, const float* s,
                     float* y) {
    begin();
    int i = own_column();
    if (i >= n) return;
    y[own_value(n)] = mul(View{x, stride, step, per_row}.vector(blockIdx.x)[i], s[i]);
}
