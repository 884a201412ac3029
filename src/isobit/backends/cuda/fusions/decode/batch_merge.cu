// A step of several sequences: attention's tiles merged, with GATED times a sigmoid, and quantised for the product
// after it.
#include "merge.cuh"
#include "exchange.cuh"

// A superblock of one sequence a warp, `count` of them all. With BOUNDS this part has some heads, whose outputs it
// sends to the others; then a block has a row, from `first` on, and all blocks run at once, and wait for the others' of
// the same row. gate: of the first row; the next ones' are gate_stride floats apart. only: which rows, if not all.
KERNEL(256) batch_merge(const int* positions, const float2* max_and_sum, const float* out, int most_tiles,
                        int first, int count, ActivationBlock* acts, const float* gate, int64 gate_stride,
                        const int* only,
                        const uint64* exchanges, int site) {
    auto tiles_of = [&](int64 row) {
        int64 result = row * HEADS * most_tiles;
        return TileResults{max_and_sum + result, out + result * HEAD_DIM, most_tiles, positions[row] / KV_PAGE + 1};
    };
#ifdef BOUNDS
    constexpr int SUPERS = Cut::SUPERS, WARPS = THREADS / WARP, EACH = (SUPERS + WARPS - 1) / WARPS;
    static_assert(Cut::WHOLE % SUPER == 0, "whole superblocks");
#else
    constexpr int SUPERS = HEADS * HEAD_DIM / SUPER;
#endif
    Exchange<Cut> exchange(exchanges, site);
    let_next_start();
    wait_for_previous();
#ifdef BOUNDS
    int64 row = first + int(blockIdx.x);
    TileResults from = tiles_of(row);
    float v[EACH][8];
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        int s = warp_id() + i * WARPS, column = s * SUPER + 8 * lane_id();
        if (s >= SUPERS || Cut::part_of(column) != exchange.rank) continue;
        from.merged<2 * FEW_TILES, true>(column - exchange.first, v[i]);
        exchange.send8<false>(exchange.at(row, s), v[i]);
    }
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        int s = warp_id() + i * WARPS, part = Cut::part_of(s * SUPER + 8 * lane_id());
        if (s >= SUPERS) break;
        if (part != exchange.rank) exchange.receive8<false>(part, exchange.at(row, s), v[i]);
        __syncwarp();
        quantise_superblock(v[i], acts + row * SUPERS + s);
    }
#else
    int index = blockIdx.x * (THREADS / WARP) + warp_id();
    if (index >= count || (only && !only[index / SUPERS])) return;
    float v[8];
    int column = index % SUPERS * SUPER + 8 * lane_id();
    tiles_of(index / SUPERS).merged<2 * FEW_TILES, true>(column, v);
#ifdef GATED
    gate_columns(gate + index / SUPERS * gate_stride, column, v);
#endif
    quantise_superblock(v, acts + index);
#endif
}
