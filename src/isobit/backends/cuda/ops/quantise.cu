// The fixed-point form of a value (docs/numerics.md, section 3), which products read.
#include "views.cuh"

// `count` vectors of n values to rows of ceil(n / 256) superblocks; a superblock a warp.
KERNEL(THREADS) quantise(const float* x, int64 stride, int step, int per_row, int n, int count,
                         ActivationBlock* out) {
    begin();
    int supers = (n + SUPER - 1) / SUPER;
    int index = blockIdx.x * (THREADS / WARP) + warp_id();
    if (index >= count * supers) return;
    int column = index % supers * SUPER + 8 * lane_id();
    const float* from = View{x, stride, step, per_row}.vector(index / supers) + column;
    float v[8];
    load8(from, n - column, v);
    quantise_superblock(v, out + index);
}
