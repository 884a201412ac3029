// Clamped SwiGLU (docs/numerics.md, section 5).
#include "views.cuh"

KERNEL(THREADS) clamped_gate(const float* gate, int64 gate_stride, int gate_step, const float* up,
                             int64 up_stride, int up_step, int per_row, int n, float limit,
                             float factor, float* y) {
    begin();
    int i = own_column();
    if (i >= n) return;
    float g = View{gate, gate_stride, gate_step, per_row}.vector(blockIdx.x)[i];
    float u = View{up, up_stride, up_step, per_row}.vector(blockIdx.x)[i];
    g = g > limit ? limit : g;  // a NaN stays
    u = u > limit ? limit : u < -limit ? -limit : u;
    float h = div(g, add(1.0f, isobit::exp(-mul(g, factor))));
    y[own_value(n)] = mul(h, add(u, 1.0f));
}
