// How fast the device reads its memory, for comparison.
#include "common.cuh"

// All of n words of 16 bytes. Nothing is written unless their bits happen to make one number.
KERNEL(THREADS) read_all(const int4* words, int64 n, int* out) {
    constexpr int WORDS = 8;
    int4 sum = {0, 0, 0, 0};
    int64 stride = int64(gridDim.x) * THREADS;
    for (int64 i = int64(blockIdx.x) * THREADS + threadIdx.x; i < n; i += WORDS * stride) {
        int4 v[WORDS];
#pragma unroll
        for (int k = 0; k < WORDS; k++)
            v[k] = i + k * stride < n ? load_once(words + i + k * stride) : int4{0, 0, 0, 0};
#pragma unroll
        for (int k = 0; k < WORDS; k++)
            sum.x ^= v[k].x, sum.y ^= v[k].y, sum.z ^= v[k].z, sum.w ^= v[k].w;
    }
    if ((sum.x ^ sum.y ^ sum.z ^ sum.w) == 0x12345) *out = 1;
}
