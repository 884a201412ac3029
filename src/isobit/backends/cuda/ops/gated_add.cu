// A shared expert's output, scaled by its gate, added to the routed sum (docs/numerics.md, section 7).
#include "views.cuh"

KERNEL(THREADS) gated_add(const float* x, int64 x_stride, int x_step, const float* y,
                          int64 y_stride, int y_step, int per_row, int n, const float* gate,
                          int64 gate_stride, float* z) {
    begin();
    int i = own_column();
    if (i >= n) return;
    float a = View{x, x_stride, x_step, per_row}.vector(blockIdx.x)[i];
    float b = View{y, y_stride, y_step, per_row}.vector(blockIdx.x)[i];
    float s = sigmoid(gate[int64(blockIdx.x) * gate_stride]);
    z[own_value(n)] = add(a, mul(s, b));
}
