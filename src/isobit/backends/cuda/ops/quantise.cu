// The fixed-point form of a value (docs/numerics.md, section 3), which products read.
#include "exchange.cuh"
#include "views.cuh"

// `count` vectors of n values to rows of ceil(n / 256) superblocks; a superblock a warp. With BOUNDS x has this
// part's columns, and the others' were sent by the kernels ahead.
KERNEL(THREADS) quantise(const float* x, int64 stride, int step, int per_row, int n, int count,
                         ActivationBlock* out, const uint64* exchanges, int site) {
    Exchange<Cut> exchange(exchanges, site);
    begin();
    int supers = (n + SUPER - 1) / SUPER;
    int index = blockIdx.x * (THREADS / WARP) + warp_id();
    if (index >= count * supers) return;
    int column = index % supers * SUPER + 8 * lane_id();
    const float* from = View{x, stride, step, per_row}.vector(index / supers) + column;
    float v[8];
#ifdef BOUNDS
    exchange.load_super(from - column, index / supers, index % supers, v);
#else
    load8(from, n - column, v);
#endif
    quantise_superblock(v, out + index);
}
