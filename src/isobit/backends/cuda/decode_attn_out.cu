// A decode step: the output product of attention. WEIGHT: a struct of tiles.cuh.
#include "merge.cuh"
#include "products.cuh"

// The output product of attention, and the residual, in place. Attention comes as its tiles' results
// when there are few (`tiles` not null: decode_attention.cu), merged here by every block for itself.
struct AttnOut {
    const uint8* w;
    static constexpr int GROUPS = HIDDEN / TILE_ROWS;
    DEV const uint8* tile(int j) const {
        int group = blockIdx.x + j / HEADS_SUPERS * gridDim.x;
        return w + (int64(group) * HEADS_SUPERS + j % HEADS_SUPERS) * WEIGHT::TILE_BYTES;
    }
    DEV int act(int j) const { return j % HEADS_SUPERS; }
};
struct AttnOutShared {
    Act x[HEADS_SUPERS];
    __align__(16) uint8 tail[16];
};
KERNEL(512) decode_attn_out(const float* attention, const Step* step, const float2* max_and_sum,
                                const float* tiles, int most_tiles, const uint8* w, float* x) {
    mark(1, 0);
    DYNAMIC_SHARED(AttnOutShared, sh);
    AttnOut out = {w};
    int n = dealt(AttnOut::GROUPS);
    using Tiles = Products<WEIGHT, AttnOut, DEPTH>;
    Tiles products(out, sh->tail, n * HEADS_SUPERS, warp_id());
    products.start();
    float* part = reinterpret_cast<float*>(sh->tail + Tiles::bytes(n * HEADS_SUPERS));
    let_next_start();
    wait_for_previous();
    mark(1, 1);
    if (tiles) {
        TileResults results = {max_and_sum, tiles, most_tiles, step->position / TILE + 1};
#pragma unroll
        for (int s = warp_id(); s < HEADS_SUPERS; s += WARPS) {
            float v[8];
            results.merged<false>(s * SUPER + 8 * lane_id(), v);
            quantise_superblock(v, sh->x + s);
        }
    } else {
        quantise_supers(attention, HEADS_SUPERS, sh->x);
    }
    __syncthreads();
    mark(1, 2);
    products.run(sh->x, part);
    __syncthreads();
    mark(1, 3);
#pragma unroll 1
    for (int i = threadIdx.x; i < n * TILE_ROWS; i += BLOCK) {
        int unit = i / TILE_ROWS, row = i % TILE_ROWS;
        int at = (blockIdx.x + unit * gridDim.x) * TILE_ROWS + row;
        float y = sum_supers<HEADS_SUPERS>(part + unit * HEADS_SUPERS * TILE_ROWS + row);
        x[at] = add(x[at], y);
    }
    mark(1, 5);
}
