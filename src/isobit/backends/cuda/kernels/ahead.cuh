// What a product of experts reads that comes soon, as long as the kernels before it read little: of the row blocks of
// all of its matrices every EVERYth, from FIRST on, goes into the device's shared cache.
#pragma once
#include "copy.cuh"

struct Ahead {
    const uint8 *first, *second;
    uint32 nbytes, row_blocks;  // of a row block; of all matrices
    template <int EVERY, int FIRST>
    DEV void bring() const {
#pragma unroll 1
        for (uint32 i = FIRST + EVERY * (blockIdx.x + gridDim.x * threadIdx.x); i < row_blocks; i += EVERY * gridDim.x * BLOCK) {
            prefetch_bulk(first + uint64(i) * nbytes, nbytes);
            prefetch_bulk(second + uint64(i) * nbytes, nbytes);
        }
    }
};
