// y = W x of a few items for each of many matrices: see batch_matmul.cuh. With MORE, a struct of tiles.cuh,
// `second` is a matrix of that format, whose rows are behind those of `first`, as one matrix each: some
// blocks take its units.
// With PLANNED, groups and order are known before the kernel ahead has ended; with FLAGGED as well, if it
// has said so by `planned`, which is 0 again when this one has ended.
#include "batch_matmul.cuh"

struct Product {
    const uint8 *first, *second;
    int64 matrix_bytes;
    int units, supers;
    const Input* x;
    const int* n_groups;
    const ItemGroup* groups;
    Places places;
    int* planned;
    float* y;
    int stride;

    template <class W>
    DEV void make(int block, int blocks) const {
        mark(MARK, 0);
        DYNAMIC_SHARED(ColumnAct, acts);
        uint8* memory = reinterpret_cast<uint8*>(acts + COLUMNS * supers);
        Stream<W> weights(first, second, matrix_bytes, groups, units, supers, memory);
#ifndef PLANNED
        wait_for_previous();  // before the next kernel starts, to which groups are known so
#elif defined(FLAGGED)
        if (!load_acquire(planned)) wait_for_previous();
#endif
        let_next_start();
        Share share(int64(*n_groups) * units, block, blocks);
        weights.start(share.at + unit_offset(), share.end);
#ifdef PLANNED
        wait_for_previous();
#endif
#ifdef FLAGGED
        if (blockIdx.x == 0 && threadIdx.x == 0) store_release(planned, 0);
#endif
        mark(MARK, 1);
        float* parts = reinterpret_cast<float*>(memory + BATCH_WARPS * Stream<W>::BYTES);
        multiply_units(weights, share.at, share.end, x, groups, places, acts, parts, y, stride);
        mark(MARK, 4);
    }
};

KERNEL(BLOCK) batch_matmul(const uint8* first, const uint8* second, int64 matrix_bytes, int units,
                           int supers, const Input* x, const int* n_groups, const ItemGroup* groups,
                           const int* order, int divide, int* planned, float* y, int stride,
                           int more_units, int more_blocks) {
    Product product = {first,  second, matrix_bytes,    units,   supers, x,
                       n_groups, groups, {order, divide}, planned, y,      stride};
    int blocks = gridDim.x - more_blocks;
#ifdef MORE
    if (int(blockIdx.x) >= blocks) {
        product.first = second, product.y = y + 16 * units, product.units = more_units;
        return product.make<MORE>(blockIdx.x - blocks, more_blocks);
    }
#endif
    product.make<WEIGHT>(blockIdx.x, blocks);
}
