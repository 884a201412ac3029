// Which products a launch of a matmul kernel makes.
//
// A launch covers segments: segment e (blockIdx.y) multiplies matrix e of a stack with the items
// offset[e] … offset[e+1]-1 of `order`. Item i reads activation row i / divide and writes output row i.
// Without `order` there is one matrix, and the items are the tokens.
#pragma once
#include "common.cuh"

constexpr int CHUNK = 8;  // items that share one read of a weight; blockIdx.z takes every so many

struct Items {
    const int* order;
    const int* offset;
    int divide, begin, end;

    DEV Items(const int* order, const int* offset, int divide, int items, int segment)
        : order(order), offset(offset), divide(divide),
          begin(offset ? offset[segment] : 0), end(offset ? offset[segment + 1] : items) {}
    DEV Items(const int* order, const int* offset, int divide, int items)
        : Items(order, offset, divide, items, blockIdx.y) {}
    DEV int output(int i) const { return order ? order[i] : i; }
    DEV int input(int i) const { return output(i) / divide; }
};

// Up to COLUMNS items that share a matrix: places begin … begin + count - 1 of `order`.
struct ItemGroup {
    int matrix, begin, count, unused;
};
#ifndef COLUMNS
#define COLUMNS 8  // of one or several tensor-core products: items of a group
#endif
