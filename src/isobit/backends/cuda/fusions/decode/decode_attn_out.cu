// A decode step: the output product of attention. WEIGHT: a struct of tiles.cuh.
#include "expert_prefetch.cuh"
#include "merge.cuh"
#include "products.cuh"

// The output product of attention, and the residual, in place. Attention comes as its tiles' results
// when there are few (`tiles` not null: decode_attention.cu) of one row or two, merged here by every block for itself.
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
    ActivationBlock x[ROWS * HEADS_SUPERS];
#if EXPERTS
    PredictorShared prediction;
#endif
    __align__(16) uint8 tail[16];
};
// While attention runs, the experts are predicted, from x as it still is: expert_prefetch.cuh. fetch: whether their
// gate and up (1) and down (2) are brought to the device's shared cache.
KERNEL(512) decode_attn_out(const float* attention, const int* positions, const int* step_number,
                            const float2* max_and_sum, const float* tiles, int most_tiles,
                            const uint8* w, const uint8* router,
                            const float* ffn_norm, const uint8* gate, const uint8* up,
                            const uint8* down, int64 gate_bytes, int64 down_bytes, int fetch,
                            uint64* prediction, float* x) {
    mark(1, 0);
    DYNAMIC_SHARED(AttnOutShared, sh);
    AttnOut out = {w};
    int n = dealt(AttnOut::GROUPS);
    using Tiles = Products<WEIGHT, AttnOut, DEPTH>;
    Tiles products(out, sh->tail, n * HEADS_SUPERS, warp_id());
    products.start();
    float* part = reinterpret_cast<float*>(sh->tail + Tiles::bytes(n * HEADS_SUPERS));
    if (!tiles) let_next_start();
#if EXPERTS
    int number = *step_number;
    ExpertPredictor{router, ffn_norm}.make(x, number, &sh->prediction, prediction);
    if (fetch && warp_id() >= WARPS - ROWS) {
        int expert = predicted_experts<MAX_POLLS>(prediction + (WARPS - 1 - warp_id()) * EXPERTS, number);
        prefetch_experts(gate, gate_bytes, expert);
        prefetch_experts(up, gate_bytes, expert);
        prefetch_experts(down, down_bytes, expert);
    }
#endif
    mark(1, 4);
    wait_for_previous();
    mark(1, 1);
    if (ROWS <= 2 && tiles) {
#pragma unroll 1
        for (int r = 0; r < ROWS; r++) {
            int64 row = r * int64(HEADS) * most_tiles;
            TileResults results = {max_and_sum + row, tiles + row * HEAD_DIM, most_tiles,
                                   positions[r] / TILE + 1};
#pragma unroll
            for (int s = warp_id(); s < HEADS_SUPERS; s += WARPS) {
                float v[8];
                results.merged<FEW_TILES, false>(s * SUPER + 8 * lane_id(), v);
                quantise_without_digits(v, sh->x + r * HEADS_SUPERS + s);
            }
        }
        let_next_start();  // not before: its weights would come ahead of the few bytes read here
    } else {
        quantise_supers(attention, ROWS * HEADS_SUPERS, sh->x);
    }
    int parts = n * HEADS_SUPERS * TILE_ROWS;  // of a token
    // Of the thread's first row, on its way while products are made; most threads have none.
    float before = threadIdx.x < ROWS * n * TILE_ROWS ? x[own_row(threadIdx.x, n)] : 0.0f;
    __syncthreads();
    mark(1, 2);
    products.run(sh->x, part, HEADS_SUPERS, parts);
    __syncthreads();
    mark(1, 3);
#pragma unroll 1
    for (int i = threadIdx.x; i < ROWS * n * TILE_ROWS; i += BLOCK) {
        int unit = i / TILE_ROWS, row = i % TILE_ROWS, r = ROWS == 1 ? 0 : unit / n;
        int at = own_row(i, n);
        float y = sum_supers<HEADS_SUPERS>(part + r * parts +
                                           (unit - r * n) * HEADS_SUPERS * TILE_ROWS + row);
        x[at] = add(i < BLOCK ? before : x[at], y);
    }
    mark(1, 5);
}
