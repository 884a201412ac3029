// y = W x in a step of several sequences, the same W for all tokens, in parts that are not added up here: a block
// takes one superblock of columns, so that it reads a superblock of each token's activations, not all of them, and
// of it some row blocks of 16 rows, which a warp unpacks once for all tokens. Whoever reads
// parts[superblock][token][row] adds them up in the order of superblocks (docs/numerics.md, section 4).
//
// WEIGHT, and MORE for the rows behind those of WEIGHT: structs of tiles.cuh. Weights are on their way, ROUNDS
// row blocks of each warp, before the kernels ahead have ended.
#include "step.cuh"
#include "tile_pairs.cuh"
#ifdef AHEAD
#include "ahead.cuh"
#endif

constexpr int PART_WARPS = BLOCK / WARP;
#ifdef MORE
constexpr int SLOT = 2 * (WEIGHT::TILE_BYTES > MORE::TILE_BYTES ? WEIGHT::TILE_BYTES : MORE::TILE_BYTES);
#else
constexpr int SLOT = 2 * WEIGHT::TILE_BYTES;
#endif

// Superblock s of a row block's 16 rows.
template <class W>
DEV void fetch(uint8* to, const uint8* matrix, int row_block, int s, int supers) {
    const uint8* from = matrix + (int64(2 * row_block) * supers + s) * W::TILE_BYTES;
    for (int i = 16 * lane_id(); i < W::TILE_BYTES; i += 16 * WARP) {
        copy_async(to + i, from + i);
        copy_async(to + W::TILE_BYTES + i, from + supers * W::TILE_BYTES + i);
    }
}

// y: the part's first of the row block.
template <class W>
DEV void multiply(const uint8* slot, const ColumnActivations* acts, int tokens, float* y, int stride) {
    const int* tile[2] = {reinterpret_cast<const int*>(slot), reinterpret_cast<const int*>(slot + W::TILE_BYTES)};
    int g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll 1
    for (int first = 0; first < tokens; first += 8) {
        const ColumnActivations* here = acts + first;
        int count = min(8, tokens - first);
        Columns x[1] = {Columns(here, count)};
        float u[1][4];
        TilePair<W>::product(tile, x, u);
#pragma unroll
        for (int c = 0; c < 2; c++) {
            int column = 2 * t + c;
            if (column >= count) continue;
            float d = here[column].d, *to = y + int64(first + column) * stride + g;
            to[0] = mul(d, u[0][c]);
            to[8] = mul(d, u[0][2 + c]);
        }
    }
}

// A slice of the row blocks is every `slices`th. stride: rows of all matrices.
KERNEL(BLOCK) part_matmul(const uint8* first, const uint8* second, int row_blocks, int more_row_blocks, int supers,
                          int slices, const ActivationBlock* x, int tokens, float* parts, int stride,
                          const uint8* ahead_first, const uint8* ahead_second, int ahead_bytes, int ahead_row_blocks) {
    DYNAMIC_SHARED(ColumnActivations, acts);
    uint8* slots = reinterpret_cast<uint8*>(acts + tokens) + warp_id() * ROUNDS * SLOT;
    let_next_start();
    int s = blockIdx.x % supers, slice = blockIdx.x / supers, all = row_blocks + more_row_blocks;
    auto row_block = [&](int round) { return slice + (warp_id() + round * PART_WARPS) * slices; };
#pragma unroll 1
    for (int round = 0; row_block(round) < all; round++) {
#ifdef MORE
        if (row_block(round) >= row_blocks)
            fetch<MORE>(slots + round * SLOT, second, row_block(round) - row_blocks, s, supers);
        else
#endif
            fetch<WEIGHT>(slots + round * SLOT, first, row_block(round), s, supers);
    }
    commit_copies();
#ifdef AHEAD
    Ahead{ahead_first, ahead_second, uint32(ahead_bytes), uint32(ahead_row_blocks)}.bring<AHEAD, 0>();
#endif
    wait_for_previous();
#pragma unroll 1
    for (int i = warp_id(); i < tokens; i += PART_WARPS) copy_activations(acts + i, x + int64(i) * supers + s);
    commit_copies();
    wait_copies<0>();
    __syncthreads();
    parts += int64(s) * tokens * stride;
#pragma unroll 1
    for (int round = 0; row_block(round) < all; round++) {
        float* y = parts + 16 * row_block(round);
#ifdef MORE
        if (row_block(round) >= row_blocks)
            multiply<MORE>(slots + round * SLOT, acts, tokens, y, stride);
        else
#endif
            multiply<WEIGHT>(slots + round * SLOT, acts, tokens, y, stride);
    }
}
