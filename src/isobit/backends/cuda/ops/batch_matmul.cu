// y = W x of a few items for each of many matrices: see batch_matmul.cuh.
// With PLANNED, groups and order are known before the kernel ahead has ended; with FLAGGED as well, if it
// has said so by `planned`, which is 0 again when this one has ended.
#include "batch_matmul.cuh"

KERNEL(BLOCK) batch_matmul(const uint8* first, const uint8* second, int64 matrix_bytes, int units,
                           int supers, const Input* x, const int* n_groups, const ItemGroup* groups,
                           const int* order, int divide, int* planned, float* y, int stride) {
    DYNAMIC_SHARED(ColumnAct, acts);
    uint8* memory = reinterpret_cast<uint8*>(acts + COLUMNS * supers);
    Stream weights(first, second, matrix_bytes, groups, units, supers, memory);
#ifndef PLANNED
    wait_for_previous();  // before the next kernel starts, to which groups are known so
#elif defined(FLAGGED)
    if (!load_acquire(planned)) wait_for_previous();
#endif
    let_next_start();
    int64 all = int64(*n_groups) * units;
    int at = int(all * blockIdx.x / gridDim.x), end = int(all * (blockIdx.x + 1) / gridDim.x);
    weights.start(at + unit_offset(), end);
#ifdef PLANNED
    wait_for_previous();
#endif
#ifdef FLAGGED
    if (blockIdx.x == 0 && threadIdx.x == 0) store_release(planned, 0);
#endif
    multiply_units(weights, at, end, x, groups, {order, divide}, acts,
                   reinterpret_cast<float*>(memory + BATCH_WARPS * Stream::BYTES), y, stride);
}
