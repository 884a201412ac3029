// Router and weighted sum of experts (docs/numerics.md, section 7), and tokens sorted by expert.
// PARTS: of the experts, 32 each; lane l of a warp has l, l + 32, … of them. GROUPED: not all of the
// experts' groups are used.
#include "sorted_pairs.cuh"

// An integer that compares as the score does, above 0, which is for what is not to be chosen.
DEV uint32 key_of(float score) {
    uint32 b = bits(score);
    return max(b & 0x80000000u ? ~b : b | 0x80000000u, 1u);
}
DEV float score_of(uint32 key) {
    return isobit::from_bits(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

struct Router {
    int experts, k, normalise, softmax;
    const float* bias;  // null, or one an expert
    int groups, groups_used;

    DEV int expert(int part) const { return lane_id() + WARP * part; }

    // Probabilities of a token's logits.
    DEV void softmax_of(float (&p)[PARTS]) const {
        float m = p[0], lanes[8] = {};
#pragma unroll
        for (int i = 1; i < PARTS; i++) m = fmaxf(m, p[i]);
        m = warp_max(m);
#pragma unroll
        for (int i = 0; i < PARTS; i++) {
            p[i] = expert(i) < experts ? isobit::exp(sub(p[i], m)) : 0.0f;
            lanes[i % 8] = add(lanes[i % 8], p[i]);
        }
        float total = tree256(lanes);
#pragma unroll
        for (int i = 0; i < PARTS; i++) p[i] = div(p[i], total);
    }

#ifdef GROUPED
    // Keys of experts in all but the best groups become 0. scratch: shared, of the warp, experts + groups.
    DEV void leave_groups(uint32 (&key)[PARTS], uint32* scratch) const {
        uint32* score = scratch + experts;
        int size = experts / groups;
#pragma unroll
        for (int i = 0; i < PARTS; i++)
            if (expert(i) < experts) scratch[expert(i)] = key[i];
        __syncwarp();
        for (int g = lane_id(); g < groups; g += WARP) {
            uint32 best = 0, second = 0;
#pragma unroll 1
            for (int e = g * size; e < (g + 1) * size; e++) {
                second = max(second, min(best, scratch[e]));
                best = max(best, scratch[e]);
            }
            // Of a softmax a group is as good as its best, else the second added.
            score[g] = softmax ? best : key_of(add(score_of(best), score_of(second)));
        }
        __syncwarp();
#pragma unroll
        for (int i = 0; i < PARTS; i++) {
            if (expert(i) >= experts) continue;
            int own = expert(i) / size, before = 0;
#pragma unroll 1
            for (int g = 0; g < groups; g++) before += score[g] > score[own] - (g < own);
            if (before >= groups_used) key[i] = 0;
        }
        __syncwarp();
    }
#endif

    // The experts of a token and their weights, by one warp. z: logits, or without softmax
    // probabilities.
    DEV void router_top_k(const float* z, uint32* scratch, int* ids, float* weights) const {
        float p[PARTS];
        uint32 key[PARTS];
#pragma unroll
        for (int i = 0; i < PARTS; i++)
            p[i] = expert(i) < experts ? z[expert(i)] : isobit::from_bits(0xff800000u);
        if (softmax) softmax_of(p);
#pragma unroll
        for (int i = 0; i < PARTS; i++)
            key[i] = expert(i) < experts
                         ? key_of(add(p[i], bias ? bias[expert(i)] : 0.0f))
                         : 0u;
#ifdef GROUPED
        leave_groups(key, scratch);
#endif
        int id[2] = {};  // of rank lane, and lane + 32
        float chosen[2] = {}, all = 0.0f;
#pragma unroll 1
        for (int rank = 0; rank < k; rank++) {
            uint32 best = key[0], first = 0;
#pragma unroll
            for (int i = 1; i < PARTS; i++) best = max(best, key[i]);
            best = warp_max(best);
#pragma unroll
            for (int i = PARTS - 1; i >= 0; i--)  // of equals the lowest is the largest complement
                if (key[i] == best) first = ~uint32(expert(i));
            int e = ~warp_max(first);
            float w = 0.0f;
#pragma unroll
            for (int i = 0; i < PARTS; i++)
                if (e == expert(i)) w = p[i], key[i] = 0;
            w = shuffle(w, e % WARP);
            all = add(all, w);
#pragma unroll
            for (int i = 0; i < 2; i++)
                if (rank == lane_id() + WARP * i) id[i] = e, chosen[i] = w;
        }
        all = all < 0x1p-14f ? 0x1p-14f : all;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            int rank = lane_id() + WARP * i;
            if (rank >= k) break;
            ids[rank] = id[i];
            weights[rank] = normalise ? div(chosen[i], all) : chosen[i];
        }
    }
};

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

// Pairs (token, rank) ordered by expert, OWN experts a block; every block counts all of them. As no token has
// an expert twice, a pair's place is the number of lower tokens that have its expert, and each of the block's
// experts has a bit for each token. Of a split model a part has the experts from `before` on, which count from
// 0, and leaves out pairs of others.
constexpr int OWN = 8;
struct Sorter {
    const int* ids;  // [tokens][k]
    int tokens, k, before, experts, first, words;
    int* place;        // shared, an expert each: its pairs, then where they begin
    uint32* chosen;    // shared, an odd number of words an expert of the block
    int* lower;        // the same: bits in words below

    DEV Sorter(const int* ids, int tokens, int k, int before, int experts, int* shared)
        : ids(ids), tokens(tokens), k(k), before(before), experts(experts), first(blockIdx.x * OWN),
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
                id[i] = at + i * int(blockDim.x) < n ? ids[at + i * blockDim.x] - before : -1;
#pragma unroll
            for (int i = 0; i < MORE; i++)
                if (uint32(id[i]) < uint32(experts)) f(at + i * blockDim.x, id[i]);
        }
    }
    DEV bool own(int id) const { return uint32(id - first) < uint32(OWN); }
    DEV int word(int id, int token) const { return (id - first) * words + token / WARP; }

    // Counts become places; blocks write those of their own experts. At most as many experts as threads.
    DEV void add_up(int* expert_offsets, PairGroup* groups, int* n_groups, int columns) {
        __shared__ int pairs_of[1024 / WARP], groups_of[1024 / WARP], cost_of[1024 / WARP];
        int e = threadIdx.x, mine = e < experts ? place[e] : 0;
        int end = warp_scan(mine), whole = mine / columns, left = mine % columns, in_groups = whole + (left > 0);
        int cost = whole * row_block_cost(columns) + (left ? row_block_cost(left) : 0);
        int groups_end = warp_scan(in_groups), cost_end = warp_scan(cost);
        if (lane_id() == WARP - 1)
            pairs_of[warp_id()] = end, groups_of[warp_id()] = groups_end, cost_of[warp_id()] = cost_end;
        __syncthreads();
        if (e >= experts) return;
#pragma unroll 1
        for (int w = 0; w < warp_id(); w++) end += pairs_of[w], groups_end += groups_of[w], cost_end += cost_of[w];
        int begin = end - mine;
        place[e] = begin;
        if (!own(e)) return;
        expert_offsets[e] = begin;
        if (e == experts - 1) expert_offsets[experts] = end;
        if (!groups) return;
        PairGroup* to = groups + groups_end - in_groups;
        int before = cost_end - cost;
#pragma unroll 1
        for (int i = begin; i < end; i += columns) {
            int count = min(columns, end - i);
            *to++ = {e, i, count, before};
            before += row_block_cost(count);
        }
        if (e == experts - 1) *n_groups = groups_end, *to = {0, 0, 0, cost_end};
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
// of up to `columns`, one of none behind them, and n_groups their number. shared: what Sorter takes.
KERNEL(1024) sort_pairs(const int* ids, int tokens, int k, int before, int experts, int* sorted_pairs,
                        int* expert_offsets, PairGroup* groups, int* n_groups, int columns) {
    DYNAMIC_SHARED(int, shared);
    Sorter sorter(ids, tokens, k, before, experts, shared);
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
