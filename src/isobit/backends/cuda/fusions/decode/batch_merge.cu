// A step of several sequences: attention's tiles merged, and quantised for the product after it.
#include "merge.cuh"

constexpr int HEADS_SUPERS = HEADS * HEAD_DIM / SUPER;

// A superblock of one sequence a warp; count: of them all.
KERNEL(256) batch_merge(const int* positions, const float2* max_and_sum, const float* out,
                        int most_tiles, int count, ActivationBlock* acts) {
    let_next_start();
    wait_for_previous();
    int index = blockIdx.x * (THREADS / WARP) + warp_id(), sequence = index / HEADS_SUPERS;
    if (index >= count) return;
    int64 result = int64(sequence) * HEADS * most_tiles;
    TileResults from = {max_and_sum + result, out + result * HEAD_DIM, most_tiles,
                        positions[sequence] / TILE + 1};
    float v[8];
    from.merged<2 * FEW_TILES, true>(index % HEADS_SUPERS * SUPER + 8 * lane_id(), v);
    quantise_superblock(v, acts + index);
}
