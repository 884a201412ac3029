// RoPE (docs/numerics.md, section 5): the first `size` values of a head vector of n, the others as they
// are. NEIGHBOURS: pairs are (2i, 2i + 1), else (i, i + size / 2).
#include "views.cuh"

KERNEL(THREADS) rope(const float* x, int64 stride, int step, int per_row, int n, int size,
                     const float* cosines, const float* sines, const int* positions, float* y) {
    begin();
    int i = own_column(), half = size / 2;
    if (i >= n) return;
    const float* from = View{x, stride, step, per_row}.vector(blockIdx.x);
    float v = from[i];
    if (i < size) {
#ifdef NEIGHBOURS
        int pair = i / 2;
        bool first = i % 2 == 0;
        float other = from[i ^ 1];
#else
        bool first = i < half;
        int pair = first ? i : i - half;
        float other = from[first ? i + half : pair];
#endif
        int64 at = int64(positions[blockIdx.x / per_row]) * half + pair;
        float c = cosines[at], s = sines[at];
        v = first ? sub(mul(v, c), mul(other, s)) : add(mul(v, c), mul(other, s));
    }
    y[own_value(n)] = v;
}
