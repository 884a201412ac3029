// Head vectors, one behind the other in each head: a vector of x, of which `each` heads have the same,
// then one of y.
#include "views.cuh"

KERNEL(THREADS) join(const float* x, int64 x_stride, int x_step, const float* y, int64 y_stride, int y_step,
    int per_row, int n, int a, int each, float* z) {
    begin();
    int i = own_column();
    if (i >= n) return;
    z[own_value(n)] = i < a ? View{x, x_stride, x_step, per_row / each}.vector(blockIdx.x / each)[i]
                            : View{y, y_stride, y_step, per_row}.vector(blockIdx.x)[i - a];
}
