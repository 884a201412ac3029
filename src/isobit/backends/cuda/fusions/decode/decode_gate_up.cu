// A decode step: the choice of experts, and the first half of the feed-forward. Of several rows with experts each block
// takes one (Share). WEIGHT: a struct of tiles.cuh. EXPERTS is 0 for a dense feed-forward, and USED then 1. SHARED:
// experts that every token goes to, 0 or 1.
#include "router_top_k.cuh"
#include "expert_prefetch.cuh"
#include "products.cuh"

#ifndef SHARED
#define SHARED 0
#endif
constexpr int SLOTS = USED + SHARED;

#if EXPERTS
// The chosen experts. Each has a slot among the row blocks. Predicted experts have the slots to begin with; one that was not
// chosen then gives its slot to one that nobody predicted. All blocks must find the same.
struct Choice {
    int id[USED];  // by rank
    float p[USED];
    int expert[SLOTS];  // by slot; a shared one has the last
    int rank[SLOTS];    // of a slot's expert, -1 until it is chosen
    bool changed[SLOTS];
    bool missing;         // an expert was chosen that nobody predicted
    short slot[EXPERTS];  // of an expert, or -1
};
// expert: of slot i, in thread i.
DEV void fill_slots(int expert, Choice* choice) {
    for (int e = threadIdx.x; e < EXPERTS; e += BLOCK) choice->slot[e] = -1;
    if (threadIdx.x == 0) choice->missing = false;
    __syncthreads();
    if (threadIdx.x < USED) {
        choice->expert[threadIdx.x] = expert;
        choice->slot[expert] = threadIdx.x;
        choice->rank[threadIdx.x] = -1;
        choice->changed[threadIdx.x] = false;
    } else if (threadIdx.x < SLOTS) {
        choice->expert[threadIdx.x] = 0;
        choice->rank[threadIdx.x] = threadIdx.x;
        choice->changed[threadIdx.x] = false;
    }
    __syncthreads();
}
// By one thread.
DEV void correct_places(Choice* choice) {
    int r = 0;
    for (int s = 0; s < USED; s++) {
        if (choice->rank[s] >= 0) continue;
        while (choice->slot[choice->id[r]] >= 0) r++;
        choice->expert[s] = choice->id[r];
        choice->rank[s] = r++;
        choice->changed[s] = true;
    }
}
#else
struct Choice {
    int expert[1], rank[1];
};
#endif

// W_gate h and W_up h of the chosen experts, and SwiGLU.
struct GateUp {
    const uint8 *gate, *up, *shared_gate, *shared_up;
    const int* expert;  // of a slot: the predicted experts, and in place of wrong ones the missing
    Share share;
    static constexpr int GROUPS = FFN / TILE_ROWS;
    static constexpr int64 MATRIX = int64(GROUPS) * HIDDEN_SUPERS * WEIGHT::TILE_BYTES;
    // A row block is the same 8 rows of both matrices of one expert.
    DEV int row_block(int j) const { return share.block + j / (2 * HIDDEN_SUPERS) * share.blocks; }
    DEV int slot(int j) const { return row_block(j) / GROUPS; }
    DEV const uint8* tile(int j) const {
        int u = row_block(j), group = u % GROUPS;
        const uint8* matrix = j / HIDDEN_SUPERS % 2 ? up : gate;
        if (SHARED && slot(j) == USED) matrix = j / HIDDEN_SUPERS % 2 ? shared_up : shared_gate;
        return matrix + expert[slot(j)] * MATRIX +
               (group * HIDDEN_SUPERS + j % HIDDEN_SUPERS) * WEIGHT::TILE_BYTES;
    }
    DEV int act(int j) const { return j % HIDDEN_SUPERS; }
};
struct GateUpShared {
    ActivationBlock x[ROWS_EACH * HIDDEN_SUPERS];
#if EXPERTS
    TopKShared choosing;
#else
    float buffer[ROWS * SUPER];
    WholeRows<ROWS> whole;
#endif
    Choice choice;
    __align__(LINE) uint8 tail[16];
};
// chosen: expert and weight of each rank with the step's number, which decode_down looks for. ahead: steps of each warp
// whose weights are asked for before the router has ended.
KERNEL(512) decode_gate_up(const ActivationBlock* acts, const float* logits, int normalise, float* x,
                           const float* norm, float eps, const uint8* gate, const uint8* up,
                           const uint8* shared_gate, const uint8* shared_up,
                           const int* step_number, int ahead, const uint64* prediction, uint64* chosen,
                           float* y, const uint64* exchanges, int received, int sent) {
    DYNAMIC_SHARED(GateUpShared, sh);
    mark(3, 0);
    Share share;
    GateUp where = {gate, up, shared_gate, shared_up, sh->choice.expert, share};
    int n = share.dealt(SLOTS * GateUp::GROUPS);
    using Tiles = Products<WEIGHT, GateUp, DEPTH>;
    Tiles products(where, sh->tail, n * 2 * HIDDEN_SUPERS, warp_id());
    float* all = reinterpret_cast<float*>(sh->tail + Tiles::bytes(n * 2 * HIDDEN_SUPERS));
    Exchange<SentCut> to(exchanges, sent);
#if EXPERTS
    int number = *step_number;
    fill_slots(warp_id() == 0 ? predicted_experts<POLL_FOREVER>(prediction + share.row * EXPERTS, number) : 0, &sh->choice);
    let_next_start();
    products.start(1, ahead);
    constexpr int WORDS = HIDDEN_SUPERS * sizeof(ActivationBlock) / sizeof(int4), TAKING = BLOCK - WARP,
                  EACH = (WORDS + TAKING - 1) / TAKING;
    int4 words[EACH];
    auto at = [&](int i) { return i * TAKING + int(threadIdx.x) - WARP; };
    const float* own = at_hand(logits + share.row * EXPERTS + lane_id());
    const int4* from = at_hand(reinterpret_cast<const int4*>(acts + share.row * HIDDEN_SUPERS) + at(0));
    wait_for_previous();
    mark(3, 1);
    // The first warp chooses, the others bring what else is needed, activations before weights: the memory answers in order.
    if (warp_id() == 0) {
        router_top_k(own, sh->choice.expert, &sh->choosing, [&](int rank, int expert, float p) {
            sh->choice.id[rank] = expert;
            sh->choice.p[rank] = p;
            if (sh->choice.slot[expert] >= 0) sh->choice.rank[sh->choice.slot[expert]] = rank;
            else sh->choice.missing = true;
        });
    } else {
#pragma unroll
        for (int i = 0; i < EACH; i++)
            if (at(i) < WORDS) words[i] = from[i * TAKING];
    }
    products.start(1);
#pragma unroll
    for (int i = 0; i < EACH; i++)
        if (warp_id() && at(i) < WORDS) reinterpret_cast<int4*>(sh->x)[at(i)] = words[i];
    __syncthreads();
    mark(3, 4);
    if (share.block == 0 && threadIdx.x < USED) {
        float w = top_k_weight(threadIdx.x, normalise, sh->choice.p);
        store_relaxed(chosen + share.row * USED + threadIdx.x, packed(number, sh->choice.id[threadIdx.x], w));
    }
    if (sh->choice.missing) {
        if (threadIdx.x == 0) correct_places(&sh->choice);
        __syncthreads();
        products.correct([&](int j) { return sh->choice.changed[where.slot(j)]; });
    }
#else
    if (threadIdx.x == 0) sh->choice.expert[0] = sh->choice.rank[0] = 0;
    __syncthreads();
    products.start();
    Norm h(norm);
    h.find(x);
    let_next_start();
    wait_for_previous();
    mark(3, 1);
    if (n == 0) return;  // who reads what was sent also sends (exchange.cuh)
    Exchange<Cut> exchange(exchanges, received);
    const float* row = whole_rows(exchange, x, 0, sh->whole, blockIdx.x == 0);
    if (row != x) h.find(row);
    h.quantise(eps, sh->buffer, sh->x);
    __syncthreads();
#endif
    mark(3, 2);
    constexpr int PART = 2 * HIDDEN_SUPERS * TILE_ROWS;  // products of a row block
    products.run<ROWS_EACH>(sh->x, all, HIDDEN_SUPERS, n * PART);
    __syncthreads();
    mark(3, 3);
#pragma unroll 1
    for (int i = threadIdx.x; i < ROWS_EACH * n * TILE_ROWS; i += BLOCK) {
        int u = i / TILE_ROWS, row = i % TILE_ROWS, r = ROWS_EACH == 1 ? 0 : u / n;
        const float* part = all + u * PART + row;
        float g = sum_supers<HIDDEN_SUPERS>(part);
        float up_value = sum_supers<HIDDEN_SUPERS>(part + HIDDEN_SUPERS * TILE_ROWS);
        int row_block = share.block + (u - r * n) * share.blocks, rank = sh->choice.rank[row_block / GateUp::GROUPS];
        int vector = (share.row + r) * SLOTS + rank, column = row_block % GateUp::GROUPS * TILE_ROWS + row;
        float value = isobit::silu_gate(g, up_value);
        y[vector * FFN + column] = value;
        to.send(to.at(vector, 0) + to.first + column, value);
    }
    mark(3, 5);
}
