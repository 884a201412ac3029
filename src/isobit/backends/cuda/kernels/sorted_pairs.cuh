// Which products a launch of a matmul kernel makes.
//
// A pair is a token and an expert that it chose: token * top_k + rank. Expert e (blockIdx.y) multiplies
// matrix e of a stack with the pairs expert_offsets[e] … expert_offsets[e+1]-1 of `sorted_pairs`. Pair i
// reads activation row i / top_k and writes output row i. Without `sorted_pairs` there is one matrix,
// and the pairs are the tokens.
#pragma once
#include "common.cuh"

constexpr int CHUNK = 8;  // pairs that share one read of a weight; blockIdx.z takes every so many

struct SortedPairs {
    const int* sorted_pairs;
    const int* expert_offsets;
    int top_k, begin, end;

    DEV SortedPairs(const int* sorted_pairs, const int* expert_offsets, int top_k, int pairs, int expert)
        : sorted_pairs(sorted_pairs), expert_offsets(expert_offsets), top_k(top_k),
          begin(expert_offsets ? expert_offsets[expert] : 0), end(expert_offsets ? expert_offsets[expert + 1] : pairs) {}
    DEV SortedPairs(const int* sorted_pairs, const int* expert_offsets, int top_k, int pairs)
        : SortedPairs(sorted_pairs, expert_offsets, top_k, pairs, blockIdx.y) {}
    DEV int output(int i) const { return sorted_pairs ? sorted_pairs[i] : i; }
    DEV int input(int i) const { return output(i) / top_k; }
};

// Up to COLUMNS pairs that share a matrix: begin … begin + count - 1 of `sorted_pairs`.
// before: what the row blocks of the groups before it cost, a row block each.
struct PairGroup {
    int matrix, begin, count, before;
};
// A superblock of a row block is unpacked in about as many instructions as its product with 8 pairs takes.
DEV int row_block_cost(int pairs) { return 1 + (pairs + 7) / 8; }
#ifndef COLUMNS
#define COLUMNS 8  // of one or several tensor-core products: pairs of a group
#endif

// The sum of v over this lane and those below it.
DEV int warp_scan(int v) {
    for (int step = 1; step < WARP; step *= 2) {
        int other = shuffle(v, lane_id() - step & WARP - 1);
        if (lane_id() >= step) v += other;
    }
    return v;
}
