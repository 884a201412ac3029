// Rows of the embedding table as floats, from the file's bytes or from tiles.
#include "few_bits.cuh"

// A token's 256 values (blockIdx.x token, y superblock) by 256 threads.
KERNEL(THREADS) embed(const uint8* table, const int* tokens, int columns, float* y) {
    begin();
    int row = tokens[blockIdx.x], k = blockIdx.y * SUPER + threadIdx.x;
    float* out = y + int64(blockIdx.x) * columns + k;
#ifdef FLOATS
    if (k < columns) *out = load_float(table, int64(row) * columns + k, WEIGHT);
#else
#ifdef TILED
    // Bring the row's superblock back to the file's order.
    constexpr int BYTES = SUPER / WEIGHT::SIZE * WEIGHT::BYTES, LINES = BYTES / 16, TAIL = BYTES % 16;
    __shared__ __align__(16) uint8 raw[BYTES];
    const uint8* weight_tile = table + (int64(row / 8) * (columns / SUPER) + blockIdx.y) * 8 * BYTES;
    for (int i = threadIdx.x; i < BYTES; i += THREADS)
        raw[i] = i < LINES * 16 ? weight_tile[i / 16 * 128 + row % 8 * 16 + i % 16]
                                : weight_tile[LINES * 128 + row % 8 * TAIL + i % 16];
    __syncthreads();
    WEIGHT w = block_at<WEIGHT>(raw, threadIdx.x / WEIGHT::SIZE);
#else
    WEIGHT w = block_at<WEIGHT>(table, (int64(row) * columns + k) / WEIGHT::SIZE);
#endif
    if (k < columns) *out = dequantised(w, k % WEIGHT::SIZE);
#endif
}
