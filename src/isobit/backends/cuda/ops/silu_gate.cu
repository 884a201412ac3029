// SwiGLU (docs/numerics.md, section 5).
#include "views.cuh"

KERNEL(THREADS) silu_gate(const float* gate, int64 gate_stride, int gate_step, const float* up,
                          int64 up_stride, int up_step, int per_row, int n, float* y) {
    begin();
    int i = own_column();
    if (i >= n) return;
    const float* g = View{gate, gate_stride, gate_step, per_row}.vector(blockIdx.x);
    const float* u = View{up, up_stride, up_step, per_row}.vector(blockIdx.x);
    y[own_value(n)] = isobit::silu_gate(g[i], u[i]);
}

// Rows of a feed-forward's gate and up, n values each, to superblocks of its SwiGLU.
KERNEL(THREADS) swiglu_quantise(const float* gate, const float* up, int n, int count, ActivationBlock* out) {
    begin();
    int supers = (n + SUPER - 1) / SUPER;
    int index = blockIdx.x * (THREADS / WARP) + warp_id();
    if (index >= count * supers) return;
    int column = index % supers * SUPER + 8 * lane_id();
    int64 at = int64(index / supers) * n + column;
    float v[8], g[8], u[8];
    load8(gate + at, n - column, g);
    load8(up + at, n - column, u);
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] = isobit::silu_gate(g[i], u[i]);  // of nothing 0
    quantise_superblock(v, out + index);
}
