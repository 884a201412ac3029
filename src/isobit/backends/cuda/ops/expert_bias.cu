// To each output of an expert its own vector (docs/numerics.md, section 5).
#include "views.cuh"

// A vector's expert: ids[its number]. biases: a row of n an expert.
KERNEL(THREADS) expert_bias(const float* x, int64 stride, int step, int per_row, int n,
                            const int* ids, const float* biases, float* y) {
    begin();
    int i = own_column();
    if (i >= n) return;
    float v = View{x, stride, step, per_row}.vector(blockIdx.x)[i];
    y[own_value(n)] = add(v, biases[int64(ids[blockIdx.x]) * n + i]);
}
