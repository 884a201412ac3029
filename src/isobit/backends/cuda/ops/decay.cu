// How much of a delta net's state a token keeps, as a logarithm (docs/numerics.md, section 12).
#include "delta_rule.cuh"
#include "views.cuh"

KERNEL(THREADS) decay(const float* x, int64 stride, int step, int per_row, int n, const float* dt,
                      const float* a, float* y) {
    begin();
    int i = own_column();
    if (i >= n) return;
    float v = View{x, stride, step, per_row}.vector(blockIdx.x)[i];
    y[own_value(n)] = log_decay(v, dt[i], a[i]);
}
