// A decode step of several rows: the choice of experts, and the first half of the feed-forward, as
// decode_gate_up.cu does it for one. WEIGHT: a struct of tiles.cuh. EXPERTS is 0 for a dense feed-forward,
// and USED then 1.
#include "router_top_k.cuh"
#include "expert_prefetch.cuh"
#include "expert_slots.cuh"
#include "products.cuh"

// W_gate h and W_up h of the experts in their slots. A unit is the same 8 rows of both matrices.
struct GateUp {
    const uint8 *gate, *up;
    const int* expert;  // of a slot
    static constexpr int GROUPS = FFN / TILE_ROWS, TILES = 2 * HIDDEN_SUPERS;
    static constexpr int64 MATRIX = int64(GROUPS) * HIDDEN_SUPERS * WEIGHT::TILE_BYTES;
    DEV int unit(int j) const { return blockIdx.x + j / TILES * gridDim.x; }
    DEV int slot(int j) const { return unit(j) / GROUPS; }
    DEV const uint8* tile(int j) const {
        const uint8* matrix = j / HIDDEN_SUPERS % 2 ? up : gate;
        int64 at = (unit(j) % GROUPS * HIDDEN_SUPERS + j % HIDDEN_SUPERS) * WEIGHT::TILE_BYTES;
        return matrix + expert[slot(j)] * MATRIX + at;
    }
    DEV int act(int j) const { return j % HIDDEN_SUPERS; }
};
struct GateUpShared {
    ActivationBlock x[ROWS * HIDDEN_SUPERS];
#if EXPERTS
    TopKShared choosing;
    ExpertSlots slots;
    int id[PAIRS];
    float p[PAIRS];
#else
    float buffer[ROWS * SUPER];
    WholeRows whole;
    int expert[1];
#endif
    __align__(16) uint8 tail[16];
};
// See decode_gate_up.
KERNEL(512) rows_gate_up(const ActivationBlock* acts, const float* logits, int normalise, float* x,
                         const float* norm, float eps, const uint8* gate, const uint8* up,
                         const int* step_number, const uint64* prediction, uint64* chosen, float* y,
                         const uint64* exchanges, int received, int sent) {
    DYNAMIC_SHARED(GateUpShared, sh);
    Exchange<SentCut> to(exchanges, sent);
    mark(3, 0);
    using Tiles = Products<WEIGHT, GateUp, DEPTH>;
    constexpr int GROUPS = GateUp::GROUPS, PART = GateUp::TILES * TILE_ROWS;  // products of a unit
#if EXPERTS
    ExpertSlots* slots = &sh->slots;
    int number = *step_number;
    clear_wanted(slots);
    __syncthreads();
    if (warp_id() < ROWS) {
        int expert = predicted_experts<POLL_FOREVER>(prediction + warp_id() * EXPERTS, number);
        if (lane_id() < USED) slots->wanted[expert] = true;
    }
    __syncthreads();
    assign_slots(slots);
    __syncthreads();
    clear_wanted(slots);
    GateUp where = {gate, up, slots->expert};
    Tiles products(where, sh->tail, dealt(slots->count * GROUPS) * GateUp::TILES, warp_id());
    float* all = reinterpret_cast<float*>(sh->tail + Tiles::bytes(dealt(PAIRS * GROUPS) * GateUp::TILES));
    let_next_start();
    wait_for_previous();
    mark(3, 1);
    // Activations before weights: the memory answers in order.
    constexpr int WORDS = ROWS * HIDDEN_SUPERS * sizeof(ActivationBlock) / sizeof(int4);
    for (int i = threadIdx.x; i < WORDS; i += BLOCK)
        copy_async(reinterpret_cast<int4*>(sh->x) + i, reinterpret_cast<const int4*>(acts) + i);
    commit_copies();
    __syncthreads();  // nothing is wanted
    auto found = [&](int row, int rank, int expert, float p) {
        sh->id[row * USED + rank] = expert;
        sh->p[row * USED + rank] = p;
        slots->wanted[expert] = true;
    };
    router_top_k(logits, &sh->choosing, [&] { products.start(); }, found);
    __syncthreads();
    mark(3, 4);
    if (blockIdx.x == 0 && threadIdx.x < PAIRS) {
        int rank = threadIdx.x % USED;
        float w = top_k_weight(rank, normalise, sh->p + threadIdx.x - rank);
        store_relaxed(chosen + threadIdx.x, packed(number, sh->id[threadIdx.x], w));
    }
    bool changed = reassign_slots(slots);
    __syncthreads();
    if (changed)
        products.change([&](int j) { return slots->changed[where.slot(j)]; },
                        dealt(slots->count * GROUPS) * GateUp::TILES);
    rank_slots(slots, [&](int pair) { return sh->id[pair]; });
#ifdef BULK_COPIES
    wait_copies<0>();
#else
    wait_copies<DEPTH>();  // behind which only weights are on their way
#endif
    __syncthreads();
    mark(3, 2);
    // The products of a pair lie side by side, for each of the block's units of its expert.
    int units = (GROUPS + gridDim.x - 1) / gridDim.x;
    products.run_each([&](int j, const uint8* tile, int row) {
        int unit = where.unit(j), slot = unit / GROUPS, local = units == 1 ? 0 : (unit - slot * GROUPS) / gridDim.x;
#pragma unroll 1
        for (int r = 0; r < ROWS; r++) {
            int rank = slots->rank[slot][r];
            if (rank < 0) continue;
            const ActivationBlock* a = sh->x + r * HIDDEN_SUPERS + where.act(j);
            float t[1];
            WEIGHT::dots_shared<1>(tile, row, a, 0, t);
            all[((r * USED + rank) * units + local) * PART + j % GateUp::TILES * TILE_ROWS + row] =
                mul(a->d, t[0]);
        }
    });
    __syncthreads();
    mark(3, 3);
#pragma unroll 1
    for (int i = threadIdx.x; i < PAIRS * units * TILE_ROWS; i += BLOCK) {
        int row = i % TILE_ROWS, local = i / TILE_ROWS % units, pair = i / TILE_ROWS / units;
        int first = slots->slot[sh->id[pair]] * GROUPS, grid = gridDim.x;
        int group = (int(blockIdx.x) + grid - first % grid) % grid + local * grid;
        if (group >= GROUPS) continue;
        const float* part = all + (pair * units + local) * PART + row;
        float g = sum_supers<HIDDEN_SUPERS>(part);
        float up_value = sum_supers<HIDDEN_SUPERS>(part + HIDDEN_SUPERS * TILE_ROWS);
        float value = isobit::silu_gate(g, up_value);
        y[(pair * GROUPS + group) * TILE_ROWS + row] = value;
        to.send(to.at(pair, 0) + to.first + group * TILE_ROWS + row, value);
    }
#else
    if (threadIdx.x == 0) sh->expert[0] = 0;
    __syncthreads();
    GateUp where = {gate, up, sh->expert};
    int n = dealt(GROUPS);
    Tiles products(where, sh->tail, n * GateUp::TILES, warp_id());
    float* all = reinterpret_cast<float*>(sh->tail + Tiles::bytes(n * GateUp::TILES));
    products.start();
    Norm h(norm);
    let_next_start();
    wait_for_previous();
    mark(3, 1);
    Exchange<Cut> exchange(exchanges, received);
    h.quantise(whole_rows(exchange, x, sh->whole, blockIdx.x == 0), eps, sh->buffer, sh->x);
    __syncthreads();
    mark(3, 2);
    products.run(sh->x, all, HIDDEN_SUPERS, n * PART);
    __syncthreads();
    mark(3, 3);
#pragma unroll 1
    for (int i = threadIdx.x; i < ROWS * n * TILE_ROWS; i += BLOCK) {
        int row = i % TILE_ROWS, r = i / TILE_ROWS / n, u = i / TILE_ROWS - r * n;
        const float* part = all + (r * n + u) * PART + row;
        float g = sum_supers<HIDDEN_SUPERS>(part);
        float up_value = sum_supers<HIDDEN_SUPERS>(part + HIDDEN_SUPERS * TILE_ROWS);
        int group = blockIdx.x + u * gridDim.x;
        float value = isobit::silu_gate(g, up_value);
        y[(r * GROUPS + group) * TILE_ROWS + row] = value;
        to.send(to.at(r, 0) + to.first + group * TILE_ROWS + row, value);
    }
#endif
    mark(3, 5);
}
