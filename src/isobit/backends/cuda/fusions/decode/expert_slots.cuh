// The experts of a step of several rows, each once: whose weights are read for all rows that chose it.
#pragma once
#include "decode.cuh"

#if EXPERTS
constexpr int PAIRS = ROWS * USED;  // of a row and an expert that it chose: row * USED + rank

// An expert has a place, from 0 to count - 1; all blocks find the same ones.
struct Places {
    int count;
    int expert[PAIRS];        // of a place
    int free[PAIRS];          // places, in order, for experts that have none
    bool changed[PAIRS];      // since the guess
    short place[EXPERTS];     // of an expert, or -1
    bool wanted[EXPERTS];     // guessed or chosen
    int8 rank[PAIRS][ROWS];   // of a place's expert in each row, or -1
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

DEV void nothing_wanted(Places* sh) {
    for (int e = threadIdx.x; e < EXPERTS; e += BLOCK) sh->wanted[e] = false;
}

// Places of the experts that are wanted. Barriers must lie before and behind.
DEV void place_wanted(Places* sh) {
    static_assert(EXPERTS <= BLOCK && PAIRS <= BLOCK, "a thread each");
    int e = threadIdx.x;
    bool mine = e < EXPERTS && sh->wanted[e];
    note(sh->mask[0], mine);
    __syncthreads();
    Counted at(sh->mask[0]);
    if (e < EXPERTS) sh->place[e] = mine ? at.before : -1;
    if (mine) sh->expert[at.before] = e;
    if (e == 0) sh->count = at.all;
}

// Places of the experts that are wanted now: who has one keeps it, the others get those of experts that
// nobody wants, and places behind. Whether any changed. Barriers must lie before and behind.
DEV bool place_again(Places* sh) {
    int t = threadIdx.x, before = sh->count;
    bool mine = t < EXPERTS && sh->wanted[t];
    note(sh->mask[0], mine);
    note(sh->mask[1], mine && sh->place[t] >= 0);
    __syncthreads();
    int now = Counted(sh->mask[0]).all;
    if (now == before && now == Counted(sh->mask[1]).all) return false;
    bool homeless = mine && !(sh->place[t] >= 0 && sh->place[t] < now);
    bool free = t < now && !(t < before && sh->wanted[sh->expert[t]]);
    __syncthreads();  // the masks have been read
    note(sh->mask[1], homeless);
    note(sh->mask[2], free);
    __syncthreads();
    if (free) sh->free[Counted(sh->mask[2]).before] = t;
    if (t < PAIRS) sh->changed[t] = free;
    __syncthreads();
    if (homeless) {
        int s = sh->free[Counted(sh->mask[1]).before];
        sh->expert[s] = t;
        sh->place[t] = s;
    }
    if (t == 0) sh->count = now;
    return true;
}

// Who chose the expert of each place; id(pair): an expert. Barriers must lie before and behind.
template <class Id>
DEV void rank_places(Places* sh, Id id) {
    for (int i = threadIdx.x; i < PAIRS * ROWS; i += BLOCK) (&sh->rank[0][0])[i] = -1;
    __syncthreads();
    if (threadIdx.x < PAIRS)
        sh->rank[sh->place[id(threadIdx.x)]][threadIdx.x / USED] = threadIdx.x % USED;
}
#endif
