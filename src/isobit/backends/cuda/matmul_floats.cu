// y = W x for F32, F16 and BF16 weights (docs/numerics.md, section 4). WEIGHT: KIND_F32, KIND_F16 or
// KIND_BF16.
#include "formats.cuh"
#include "items.cuh"

// A row a block: thread j is lane j of sum256.
KERNEL(THREADS) matmul_floats(const uint8* weights, int64 matrix_bytes, const float* x, int columns,
                              const int* order, const int* offset, int divide, int items,
                              float* y, int row_stride) {
    __shared__ float buffer[CHUNK][SUPER];
    Items at(order, offset, divide, items);
    const uint8* matrix = weights + blockIdx.y * matrix_bytes;
    int64 row = int64(blockIdx.x) * columns;
    for (int base = at.begin + blockIdx.z * CHUNK; base < at.end; base += gridDim.z * CHUNK) {
        int n = min(CHUNK, at.end - base);
        float sum[CHUNK] = {};
        for (int k = threadIdx.x; k < columns; k += THREADS) {
            float w = load_float(matrix, row + k, WEIGHT);
#pragma unroll
            for (int i = 0; i < CHUNK; i++)
                if (i < n) {
                    float v = x[int64(at.input(base + i)) * columns + k];
                    sum[i] = add(sum[i], mul(w, v));
                }
        }
        __syncthreads();
        for (int i = 0; i < n; i++) {
            float total = block_tree(sum[i], buffer[i]);
            if (threadIdx.x == 0) y[int64(at.output(base + i)) * row_stride + blockIdx.x] = total;
        }
    }
}
