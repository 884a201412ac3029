// How much of a delta net's state a token keeps, as a logarithm (docs/numerics.md, section 12).
#include "views.cuh"

// log(1 + e^x) as specified.
DEV float softplus(float x) {
    const float odd[] = {1.0f / 13, 1.0f / 11, 1.0f / 9, 1.0f / 7, 1.0f / 5, 1.0f / 3, 1.0f};
    float u = isobit::exp(-fabsf(x)), h = div(u, add(2.0f, u)), z = mul(h, h), p = 1.0f / 15;
#pragma unroll
    for (int k = 0; k < 7; k++) p = add(mul(p, z), odd[k]);
    return add(fmaxf(x, 0.0f), mul(add(h, h), p));
}
KERNEL(THREADS) decay(const float* x, int64 stride, int step, int per_row, int n, const float* dt,
                      const float* a, float* y) {
    begin();
    int i = own_column();
    if (i >= n) return;
    float v = View{x, stride, step, per_row}.vector(blockIdx.x)[i];
    y[own_value(n)] = mul(softplus(add(v, dt[i])), a[i]);
}
