// The experts of a step of several rows, each once: whose weights are read for all rows that chose it.
#pragma once
#include "decode.cuh"

#if EXPERTS
constexpr int PAIRS = ROWS * USED;  // of a row and an expert that it chose: row * USED + rank

// An expert has a slot, from 0 to count - 1; all blocks find the same ones.
struct ExpertSlots {
    int count;
    int expert[PAIRS];        // of a slot
    int free[PAIRS];          // slots, in order, for experts that have none
    bool changed[PAIRS];      // since the prediction
    short slot[EXPERTS];     // of an expert, or -1
    bool wanted[EXPERTS];     // predicted or chosen
    int8 rank[PAIRS][ROWS];   // of a slot's expert in each row, or -1
    uint32 mask[3][WARPS];    // threads of a warp for which something holds
};

// Of a condition, in how many threads of the block, and in how many before this one, it holds.
struct Counted {
    int all = 0, before = 0;
    DEV Counted(const uint32* mask) {
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            int n = __popc(mask[w]);
            all += n;
            if (w < warp_id()) before += n;
        }
        before += __popc(mask[warp_id()] & ((1u << lane_id()) - 1));
    }
};
DEV void note(uint32* mask, bool holds) {
    uint32 m = __ballot_sync(~0u, holds);
    if (lane_id() == 0) mask[warp_id()] = m;
}

DEV void clear_wanted(ExpertSlots* sh) {
    for (int e = threadIdx.x; e < EXPERTS; e += BLOCK) sh->wanted[e] = false;
}

// Slots of the experts that are wanted. Barriers must lie before and behind.
DEV void assign_slots(ExpertSlots* sh) {
    static_assert(EXPERTS <= BLOCK && PAIRS <= BLOCK, "a thread each");
    int e = threadIdx.x;
    bool mine = e < EXPERTS && sh->wanted[e];
    note(sh->mask[0], mine);
    __syncthreads();
    Counted at(sh->mask[0]);
    if (e < EXPERTS) sh->slot[e] = mine ? at.before : -1;
    if (mine) sh->expert[at.before] = e;
    if (e == 0) sh->count = at.all;
}

// Slots of the experts that are wanted now: who has one keeps it, the others get those of experts that
// nobody wants, and slots behind. Whether any changed. Barriers must lie before and behind.
DEV bool reassign_slots(ExpertSlots* sh) {
    int t = threadIdx.x, before = sh->count;
    bool mine = t < EXPERTS && sh->wanted[t];
    note(sh->mask[0], mine);
    note(sh->mask[1], mine && sh->slot[t] >= 0);
    __syncthreads();
    int now = Counted(sh->mask[0]).all;
    if (now == before && now == Counted(sh->mask[1]).all) return false;
    bool unplaced = mine && !(sh->slot[t] >= 0 && sh->slot[t] < now);
    bool free = t < now && !(t < before && sh->wanted[sh->expert[t]]);
    __syncthreads();  // the masks have been read
    note(sh->mask[1], unplaced);
    note(sh->mask[2], free);
    __syncthreads();
    if (free) sh->free[Counted(sh->mask[2]).before] = t;
    if (t < PAIRS) sh->changed[t] = free;
    __syncthreads();
    if (unplaced) {
        int s = sh->free[Counted(sh->mask[1]).before];
        sh->expert[s] = t;
        sh->slot[t] = s;
    }
    if (t == 0) sh->count = now;
    return true;
}

// Who chose the expert of each slot; id(pair): an expert. Barriers must lie before and behind.
template <class Id>
DEV void rank_slots(ExpertSlots* sh, Id id) {
    for (int i = threadIdx.x; i < PAIRS * ROWS; i += BLOCK) (&sh->rank[0][0])[i] = -1;
    __syncthreads();
    if (threadIdx.x < PAIRS)
        sh->rank[sh->slot[id(threadIdx.x)]][threadIdx.x / USED] = threadIdx.x % USED;
}
#endif
