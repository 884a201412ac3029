// Vectors of a value, of which each row has so many: vector v of row r begins at first + r * stride +
// v * step. So what is a part of a wider value is read where it lies.
#pragma once
#include "common.cuh"

struct View {
    const float* first;
    int64 stride;
    int step, per_row;

    DEV const float* vector(int i) const {
        return first + int64(i / per_row) * stride + int64(i % per_row) * step;
    }
};

// A thread a value: the block's vector is blockIdx.x, the thread's column of it this.
DEV int own_column() { return blockIdx.y * THREADS + threadIdx.x; }
// The same value of a result that lies in one piece.
DEV int64 own_value(int n) { return int64(blockIdx.x) * n + own_column(); }
