// A value brought into one piece, or some of its rows. Moves values, computes nothing.
#include "views.cuh"

// Vectors of the result; rows: which row of x each row is of, or null for all in order.
KERNEL(THREADS) copy(const float* x, int64 stride, int step, int per_row, int n, const int* rows,
                     float* y) {
    begin();
    int i = own_column(), vector = blockIdx.x;
    if (i >= n) return;
    if (rows) vector = rows[vector / per_row] * per_row + vector % per_row;
    y[own_value(n)] = View{x, stride, step, per_row}.vector(vector)[i];
}
