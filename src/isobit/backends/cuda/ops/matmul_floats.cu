// y = W x for F32, F16 and BF16 (docs/numerics.md, section 4): x is not quantised.
// WEIGHT: a FloatKind. ROWS: weight rows a block; more of them share one read of the activations.
#include "formats.cuh"
#include "sorted_pairs.cuh"

// Thread j is lane j of sum256 for every row and pair of the block.
KERNEL(THREADS) matmul_floats(const uint8* weights, int64 matrix_bytes, const float* x, int columns,
                              const int* sorted_pairs, const int* expert_offsets, int top_k, int pairs,
                              float* y, int rows, int row_stride) {
    begin();
    __shared__ float lanes[CHUNK][SUPER];
    SortedPairs at(sorted_pairs, expert_offsets, top_k, pairs);
    const uint8* matrix = weights + blockIdx.y * matrix_bytes;
    int first_row = blockIdx.x * ROWS;
    for (int base = at.begin + blockIdx.z * CHUNK; base < at.end; base += gridDim.z * CHUNK) {
        int n = min(CHUNK, at.end - base);
        float sum[ROWS][CHUNK] = {};
        for (int k = threadIdx.x; k < columns; k += THREADS) {
            // Missing pairs and rows are computed as others are, and not stored.
            float v[CHUNK], w[ROWS];
#pragma unroll
            for (int i = 0; i < CHUNK; i++)
                v[i] = x[int64(at.input(base + min(i, n - 1))) * columns + k];
#pragma unroll
            for (int r = 0; r < ROWS; r++)
                w[r] = load_float(matrix, int64(min(first_row + r, rows - 1)) * columns + k, WEIGHT);
#pragma unroll
            for (int r = 0; r < ROWS; r++)
#pragma unroll
                for (int i = 0; i < CHUNK; i++) sum[r][i] = add(sum[r][i], mul(w[r], v[i]));
        }
        // tree(): a warp adds up the lanes of one pair.
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            __syncthreads();
#pragma unroll
            for (int i = 0; i < CHUNK; i++) lanes[i][threadIdx.x] = sum[r][i];
            __syncthreads();
            int i = warp_id();
            const float* b = lanes[i] + lane_id();
            float even = add(add(b[0], b[128]), add(b[64], b[192]));
            float odd = add(add(b[32], b[160]), add(b[96], b[224]));
            float total = warp_tree(add(even, odd));
            if (i < n && first_row + r < rows && lane_id() == 0)
                y[int64(at.output(base + i)) * row_stride + first_row + r] = total;
        }
    }
}
static_assert(CHUNK == THREADS / WARP, "a warp an pair");
