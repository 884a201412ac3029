// Router and weighted sum of experts (docs/numerics.md, section 7), and tokens sorted by expert.
#include "router.cuh"
#include "sorted_pairs.cuh"

// A token a warp. scratch: shared, what leave_groups() needs for each warp, or nothing.
KERNEL(THREADS) router_top_k(const float* z, int tokens, int experts, int k, int normalise, int softmax,
                             const float* bias, int groups, int groups_used, int* ids,
                             float* weights) {
    DYNAMIC_SHARED(uint32, scratch);
    let_next_start();
    wait_for_previous();
    int token = blockIdx.x * (THREADS / WARP) + warp_id();
    if (token >= tokens) return;
    Router router = {experts, k, normalise, softmax, bias, groups, groups_used};
    router.router_top_k(z + int64(token) * experts, scratch + warp_id() * (experts + groups), ids + token * k,
                  weights + token * k);
}

// Pairs (token, rank) ordered by expert, OWN experts a block; every block counts all of them. In that
// order: as no token has an expert twice, a pair's place is the number of lower tokens that have its
// expert, and each of the block's experts has a bit for each token.
constexpr int OWN = 8;
struct Sorter {
    const int* ids;  // [tokens][k]
    int tokens, k, experts, first, words;
    int* place;        // shared, an expert each: its pairs, then where they begin
    uint32* chosen;    // shared, an odd number of words an expert of the block
    int* lower;        // the same: bits in words below

    DEV Sorter(const int* ids, int tokens, int k, int experts, int* shared)
        : ids(ids), tokens(tokens), k(k), experts(experts), first(blockIdx.x * OWN),
          words((tokens + WARP - 1) / WARP | 1), place(shared),
          chosen(reinterpret_cast<uint32*>(shared + experts)),
          lower(shared + experts + OWN * words) {}

    DEV void clear() {
#pragma unroll 1
        for (int i = threadIdx.x; i < experts + OWN * words; i += blockDim.x) place[i] = 0;
    }
    // Calls f with each pair and its expert; some are read at once.
    template <class F>
    DEV void each_pair(F f) const {
        constexpr int MORE = 4;
        int n = tokens * k;
#pragma unroll 1
        for (int at = threadIdx.x; at < n; at += MORE * blockDim.x) {
            int id[MORE];
#pragma unroll
            for (int i = 0; i < MORE; i++)
                id[i] = at + i * int(blockDim.x) < n ? ids[at + i * blockDim.x] : -1;
#pragma unroll
            for (int i = 0; i < MORE; i++)
                if (id[i] >= 0) f(at + i * blockDim.x, id[i]);
        }
    }
    DEV bool own(int id) const { return uint32(id - first) < uint32(OWN); }
    DEV int word(int id, int token) const { return (id - first) * words + token / WARP; }

    // Counts become places; blocks write those of their own experts. At most as many experts as threads.
    DEV void add_up(int* expert_offsets, PairGroup* groups, int* n_groups, int columns) {
        __shared__ int pairs_of[1024 / WARP], groups_of[1024 / WARP];
        int e = threadIdx.x, mine = e < experts ? place[e] : 0;
        int end = warp_scan(mine), in_groups = (mine + columns - 1) / columns;
        int groups_end = warp_scan(in_groups);
        if (lane_id() == WARP - 1) pairs_of[warp_id()] = end, groups_of[warp_id()] = groups_end;
        __syncthreads();
        if (e >= experts) return;
#pragma unroll 1
        for (int w = 0; w < warp_id(); w++) end += pairs_of[w], groups_end += groups_of[w];
        int begin = end - mine;
        place[e] = begin;
        if (!own(e)) return;
        expert_offsets[e] = begin;
        if (e == experts - 1) expert_offsets[experts] = end;
        if (!groups) return;
        PairGroup* to = groups + groups_end - in_groups;
#pragma unroll 1
        for (int i = begin; i < end; i += columns) *to++ = {e, i, min(columns, end - i), 0};
        if (e == experts - 1) *n_groups = groups_end;
    }
    // Bits in words below, an expert a warp.
    DEV void add_up_bits() {
        if (warp_id() >= OWN) return;
        int sum = 0;
#pragma unroll 1
        for (int base = 0; base < words; base += WARP) {
            int at = warp_id() * words + base + lane_id(), have = base + lane_id() < words;
            int mine = have ? __popc(chosen[at]) : 0, upto = warp_scan(mine);
            if (have) lower[at] = sum + upto - mine;
            sum += shuffle(upto, WARP - 1);
        }
    }
};

// sorted_pairs gets the pairs, expert_offsets where each expert's begin; unless null, groups those of each expert in groups
// of up to `columns`, and n_groups their number. shared: what Sorter takes.
KERNEL(1024) sort_pairs(const int* ids, int tokens, int k, int experts, int* sorted_pairs, int* expert_offsets,
                        PairGroup* groups, int* n_groups, int columns) {
    DYNAMIC_SHARED(int, shared);
    Sorter sorter(ids, tokens, k, experts, shared);
    let_next_start();
    sorter.clear();
    wait_for_previous();
    __syncthreads();
    sorter.each_pair([&](int pair, int id) {
        atomicAdd(sorter.place + id, 1);
        int token = sorter.own(id) ? pair / k : 0;
        if (sorter.own(id)) atomicOr(sorter.chosen + sorter.word(id, token), 1u << token % WARP);
    });
    __syncthreads();
    sorter.add_up_bits();
    sorter.add_up(expert_offsets, groups, n_groups, columns);
    __syncthreads();
    sorter.each_pair([&](int pair, int id) {
        if (!sorter.own(id)) return;
        int token = pair / k, at = sorter.word(id, token);
        uint32 below = sorter.chosen[at] & (1u << token % WARP) - 1;
        sorted_pairs[sorter.place[id] + sorter.lower[at] + __popc(below)] = pair;
    });
}
