// What a delta net's output product reads, from what the rule gives (docs/numerics.md, section 12): norm of head
// vectors, of HEAD_DIM values, times the SiLU of a gate; quantised.
#include "delta_rule.cuh"

// A superblock a warp, `supers` of a row; gate: rows `stride` floats apart.
KERNEL(THREADS) delta_output(const float* y, const float* gate, int64 stride, const float* norm, float eps,
                             int supers, int count, ActivationBlock* out) {
    begin();
    int index = blockIdx.x * (THREADS / WARP) + warp_id(), row = index / supers;
    if (index >= count) return;
    int column = index % supers * SUPER + 8 * lane_id();
    float v[8], g[8], w[8];
    load8(y + int64(index) * SUPER + 8 * lane_id(), v);
    load8(gate + row * stride + column, 8, g);
    load8(norm + column % HEAD_DIM, w);
    gated_norm<HEAD_DIM>(v, g, w, eps);
    quantise_superblock(v, out + index);
}
