// Equal parts of what the groups of pairs cost (sorted_pairs.cuh), a part a block.
#pragma once
#include "sorted_pairs.cuh"

// The row blocks of a block of so many, at … end - 1, of n groups. BLOCK: threads.
struct Share {
    int at, end;

    DEV Share(const PairGroup* groups, int n, int row_blocks, int block, int blocks) {
        __shared__ int bound[2];
        int all = groups[n].before * row_blocks, part = quotient(all, blocks), left = all - part * blocks;
        int cost[2];
#pragma unroll
        for (int e = 0; e < 2; e++) {
            cost[e] = part * (block + e) + quotient(left * (block + e), blocks);
            if (threadIdx.x == 0 && cost[e] == all) bound[e] = n * row_blocks;
        }
#pragma unroll 1
        for (int i = threadIdx.x; i < n; i += BLOCK) {
            int before = groups[i].before, each = groups[i + 1].before - before;
#pragma unroll
            for (int e = 0; e < 2; e++) {
                int from = cost[e] - before * row_blocks;
                if (from >= 0 && from < each * row_blocks) bound[e] = i * row_blocks + quotient(from, each);
            }
        }
        __syncthreads();
        at = bound[0], end = bound[1];
    }
};
