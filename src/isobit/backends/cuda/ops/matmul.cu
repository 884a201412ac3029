// y = W x for tiled weights (docs/numerics.md, section 4; layout.py). WEIGHT: a format of tiles.cuh.
#include "sorted_pairs.cuh"
#include "tiles.cuh"

// 32 rows a block: eight warps hold 4 groups of 8 rows by 8 superblocks, a superblock a lane.
constexpr int BLOCK_ROWS = 32, BLOCK_SUPERS = 8;

struct Shared {
    ActivationBlock x[CHUNK][BLOCK_SUPERS];
    float part[CHUNK][BLOCK_SUPERS][BLOCK_ROWS];
};

KERNEL(THREADS) matmul_tiled(const uint8* weights, int64 matrix_bytes, const ActivationBlock* x, int supers,
                             const int* sorted_pairs, const int* expert_offsets, int top_k, int pairs,
                             float* y, int rows, int row_stride) {
    begin();
    DYNAMIC_SHARED(Shared, shared);
    SortedPairs at(sorted_pairs, expert_offsets, top_k, pairs);
    const uint8* matrix = weights + blockIdx.y * matrix_bytes;
    int group = warp_id() / 2, row = lane_id() % TILE_ROWS;
    int super = warp_id() % 2 * 4 + lane_id() / TILE_ROWS;
    int first_row = blockIdx.x * BLOCK_ROWS + group * TILE_ROWS;
    const uint8* tiles = matrix + int64(first_row / TILE_ROWS) * supers * WEIGHT::TILE_BYTES;
    int sum_item = warp_id(), sum_row = lane_id();  // for which this thread adds superblocks

    for (int base = at.begin + blockIdx.z * CHUNK; base < at.end; base += gridDim.z * CHUNK) {
        int n = min(CHUNK, at.end - base);
        float sum = 0.0f;
        for (int s0 = 0; s0 < supers; s0 += BLOCK_SUPERS) {
            int ns = min(BLOCK_SUPERS, supers - s0);
            constexpr int WORDS = sizeof(ActivationBlock) / sizeof(int4);
            __syncthreads();
            for (int i = threadIdx.x; i < n * ns * WORDS; i += THREADS) {
                int pair = i / (ns * WORDS), word = i % (ns * WORDS);
                const ActivationBlock* from = x + int64(at.input(base + pair)) * supers + s0;
                reinterpret_cast<int4*>(shared->x[pair])[word] =
                    reinterpret_cast<const int4*>(from)[word];
            }
            __syncthreads();
            if (super < ns && first_row < rows) {
                WEIGHT w;
                w.load(tiles + int64(s0 + super) * WEIGHT::TILE_BYTES, row);
                for (int pair = 0; pair < n; pair++) {
                    const ActivationBlock& a = shared->x[pair][super];
                    shared->part[pair][super][group * TILE_ROWS + row] = mul(a.d, w.dot(a));
                }
            }
            __syncthreads();
            for (int s = 0; s < ns; s++) sum = add(sum, shared->part[sum_item][s][sum_row]);
        }
        int out_row = blockIdx.x * BLOCK_ROWS + sum_row;
        if (sum_item < n && out_row < rows)
            y[int64(at.output(base + sum_item)) * row_stride + out_row] = sum;
    }
}
