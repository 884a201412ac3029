// A decode step: the output product of attention, or of a delta net. WEIGHT: a struct of tiles.cuh. GATED: what it
// reads is attention times a sigmoid; NORMED: a delta net's head vectors, normed, times a SiLU (one row).
#include "expert_prefetch.cuh"
#include "delta_rule.cuh"
#include "merge.cuh"
#include "products.cuh"

#ifdef BOUNDS
constexpr int ATTENDED_SUPERS = Cut::SUPERS;  // of all parts' heads
#else
constexpr int ATTENDED_SUPERS = HEADS_SUPERS;
#endif

// The output product of attention, and the residual, in place. Attention comes as its tiles' results
// when there are few (`tiles` not null: decode_attention.cu), merged here by every block for itself.
struct AttnOut {
    const uint8* w;
    Share share;
    static constexpr int GROUPS = MADE / TILE_ROWS;
    DEV const uint8* tile(int j) const {
        int group = share.block + j / ATTENDED_SUPERS * share.blocks;
        return w + (int64(group) * ATTENDED_SUPERS + j % ATTENDED_SUPERS) * WEIGHT::TILE_BYTES;
    }
    DEV int act(int j) const { return j % ATTENDED_SUPERS; }
};

// Superblock s of what the product reads, in a warp, of attention or of the delta rule.
struct OutputGate {
    const float *gate, *norm;
    float eps;

    DEV void operator()(int s, float (&v)[8]) const {
        int column = s * SUPER + 8 * lane_id();
        (void)column;
#if defined GATED
        gate_columns(gate, column, v);
#elif defined NORMED
        float g[8], w[8];
        load8(gate + column, g);
        load8(norm + column % HEAD_DIM, w);
        gated_norm<HEAD_DIM>(v, g, w, eps);
#endif
    }
};

struct AttnOutShared {
    ActivationBlock x[ROWS_EACH * ATTENDED_SUPERS];
#if EXPERTS
    PredictorShared prediction;
#endif
    __align__(LINE) uint8 tail[16];
};
constexpr int SENDING = AttnOut::GROUPS < 8 ? AttnOut::GROUPS : 8;  // blocks that send what all merge
// own: x from the first value that this part makes. gate, head_norm, head_eps: of OutputGate. tiles is null where
// attention comes as a whole.
// While attention runs, the experts are predicted, from x as it still is: expert_prefetch.cuh. fetch: whether their
// gate and up (1) and down (2) are brought to the device's shared cache.
KERNEL(512) decode_attn_out(const float* attention, const int* positions, const int* step_number,
                            const float2* max_and_sum, const float* tiles, int most_tiles,
                            const uint8* w, const uint8* router,
                            const float* ffn_norm, const uint8* gate, const uint8* up,
                            const uint8* down, int64 gate_bytes, int64 down_bytes, int fetch,
                            uint64* prediction, const float* x, float* own, const float* gate_values,
                            const float* head_norm, float head_eps, const uint64* exchanges, int received,
                            int sent) {
    mark(1, 0);
    DYNAMIC_SHARED(AttnOutShared, sh);
    Share share;
    AttnOut out = {w, share};
    int n = share.dealt(AttnOut::GROUPS);
    using Tiles = Products<WEIGHT, AttnOut, DEPTH>;
    Tiles products(out, sh->tail, n * ATTENDED_SUPERS, warp_id());
    products.start();
    float* part = reinterpret_cast<float*>(sh->tail + Tiles::bytes(n * ATTENDED_SUPERS));
    Exchange<Cut> exchange(exchanges, received);
    Exchange<SentCut> to(exchanges, sent);
    OutputGate finish = {gate_values, head_norm, head_eps};
    if (!tiles) let_next_start();
#if EXPERTS
    int number = *step_number;
#ifndef NORMED  // decode_delta has predicted them
    ExpertPredictor{router, ffn_norm}.make(x, number, &sh->prediction, prediction);
#endif
    if (fetch && warp_id() >= WARPS - ROWS) {
        int expert = predicted_experts<MAX_POLLS>(prediction + (WARPS - 1 - warp_id()) * EXPERTS, number);
        prefetch_experts(gate, gate_bytes, expert);
        prefetch_experts(up, gate_bytes, expert);
        prefetch_experts(down, down_bytes, expert);
    }
#endif
    int have[ROWS_EACH] = {};  // tiles of each row
    if (tiles)
#pragma unroll
        for (int r = 0; r < ROWS_EACH; r++) have[r] = positions[share.row + r] / KV_PAGE + 1;
    auto results_of = [&](int r) -> TileResults {
        int64 row = (share.row + r) * int64(HEADS) * most_tiles;
        return {max_and_sum + row, tiles + row * HEAD_DIM, most_tiles, have[r]};
    };
    const float* own_values = first_values<ATTENDED_SUPERS>(attention, share.row);
#ifndef BOUNDS
    TileResults::Place first = results_of(0).place(warp_id() * SUPER + 8 * lane_id());
    first.max_and_sum = at_hand(first.max_and_sum), first.out = at_hand(first.out);
#endif
    mark(1, 4);
    wait_for_previous();
    mark(1, 1);
    if (n == 0) return;  // who reads what was sent also sends (exchange.cuh)
    if (tiles) {
#pragma unroll
        for (int r = 0; r < ROWS_EACH; r++) {
            int token = share.row + r;
            TileResults results = results_of(r);
#pragma unroll
            for (int of_warp = 0; of_warp < (ATTENDED_SUPERS + WARPS - 1) / WARPS; of_warp++) {
                int i = of_warp * WARPS + warp_id();
                if (ATTENDED_SUPERS % WARPS && i >= ATTENDED_SUPERS) break;
                float v[8];
#ifdef BOUNDS  // one of several blocks sends what each merges, first of all
                int s = (i + exchange.first / SUPER) % ATTENDED_SUPERS, column = s * SUPER + 8 * lane_id();
                int part = Cut::part_of(column);
                if (part == exchange.rank) {
                    results.merged<FEW_TILES, false>(column - exchange.first, v);
                    if (share.block == i % min(SENDING, share.blocks)) exchange.send8<false>(exchange.at(token, s), v);
                } else {
                    exchange.receive8<false>(part, exchange.at(token, s), v);
                }
                __syncwarp();
#else
                int s = i;
                results.merged<FEW_TILES, false>(r + of_warp ? results.place(s * SUPER + 8 * lane_id()) : first, v);
                finish(s, v);
#endif
                quantise_without_digits(v, sh->x + r * ATTENDED_SUPERS + s);
            }
        }
        let_next_start();  // not before: its weights would come ahead of the few bytes read here
    } else {
        quantise_vectors<ATTENDED_SUPERS>(attention, own_values, share.row, ROWS_EACH, exchange, sh->x, finish);
    }
    int parts = n * ATTENDED_SUPERS * TILE_ROWS;  // of a token
    // Of the thread's first row, on its way while products are made; most threads have none.
    float before = threadIdx.x < ROWS_EACH * n * TILE_ROWS ? own[share.place(threadIdx.x, n)] : 0.0f;
    __syncthreads();
    mark(1, 2);
    products.run<ROWS_EACH>(sh->x, part, ATTENDED_SUPERS, parts);
    __syncthreads();
    mark(1, 3);
#pragma unroll 1
    for (int i = threadIdx.x; i < ROWS_EACH * n * TILE_ROWS; i += BLOCK) {
        int at = share.place(i, n);
        float y = sum_supers<ATTENDED_SUPERS>(part + i / TILE_ROWS * ATTENDED_SUPERS * TILE_ROWS + i % TILE_ROWS);
        y = add(i < BLOCK ? before : own[at], y);
        own[at] = y;
        to.send(to.first + at, y);
    }
    mark(1, 5);
}
