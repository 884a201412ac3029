// This part's columns of a value, to where the value lies as a whole in every part's inbox.
#include "mirrors.cuh"
#include "views.cuh"

// n columns of vectors of `width`, a multiple of 4, four a thread; to: this part's own.
KERNEL(THREADS) send(const float* x, int64 stride, int step, int per_row, int n, int width, int vectors,
                     const uint64* exchanges, float* to) {
    Mirrors mirrors(exchanges);
    begin();
    int each = n / 4;
    int64 i = int64(blockIdx.x) * THREADS + threadIdx.x, vector = i / each;
    if (vector >= vectors) return;
    int column = int(i - vector * each) * 4;
    const float* from = View{x, stride, step, per_row}.vector(vector) + column;
    mirrors.store(reinterpret_cast<float4*>(to + vector * width + column),
                  make_float4(from[0], from[1], from[2], from[3]));
}
