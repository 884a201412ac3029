// Sigmoid (docs/numerics.md, section 5).
#include "views.cuh"

KERNEL(THREADS) sigmoid(const float* x, int64 stride, int step, int per_row, int n, float* y) {
    begin();
    int i = own_column();
    if (i >= n) return;
    float v = View{x, stride, step, per_row}.vector(blockIdx.x)[i];
    y[own_value(n)] = sigmoid(v);
}
