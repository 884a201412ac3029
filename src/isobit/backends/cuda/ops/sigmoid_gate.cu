// Attention's output gate (docs/numerics.md, section 5).
#include "views.cuh"

KERNEL(THREADS) sigmoid_gate(const float* x, int64 x_stride, int x_step, const float* y, int64 y_stride, int y_step,
    int per_row, int n, float* z) {
    begin();
    int i = own_column();
    if (i >= n) return;
    float a = View{x, x_stride, x_step, per_row}.vector(blockIdx.x)[i];
    float b = View{y, y_stride, y_step, per_row}.vector(blockIdx.x)[i];
    z[own_value(n)] = mul(a, sigmoid(b));
}
