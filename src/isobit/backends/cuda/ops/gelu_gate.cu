// GeGLU (docs/numerics.md, section 5).
#include "views.cuh"

KERNEL(THREADS) gelu_gate(const float* gate, int64 gate_stride, int gate_step, const float* up,
                          int64 up_stride, int up_step, int per_row, int n, float* y) {
    begin();
    int i = own_column();
    if (i >= n) return;
    const float* g = View{gate, gate_stride, gate_step, per_row}.vector(blockIdx.x);
    const float* u = View{up, up_stride, up_step, per_row}.vector(blockIdx.x);
    y[own_value(n)] = isobit::gelu_gate(g[i], u[i]);
}
