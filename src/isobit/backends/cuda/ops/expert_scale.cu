// Each output of an expert times its own number (docs/numerics.md, section 5).
#include "views.cuh"

// A vector's expert: ids[its number].
KERNEL(THREADS) expert_scale(const float* x, int64 stride, int step, int per_row, int n,
                             const int* ids, const float* scales, float* y) {
    begin();
    int i = own_column();
    if (i >= n) return;
    float v = View{x, stride, step, per_row}.vector(blockIdx.x)[i];
    y[own_value(n)] = mul(v, scales[ids[blockIdx.x]]);
}
