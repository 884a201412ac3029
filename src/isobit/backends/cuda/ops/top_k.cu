// Router and weighted sum of experts (docs/numerics.md, section 7), and tokens sorted by expert.
#include "items.cuh"

// An integer that compares as the score does, above 0, which is for what is not to be chosen.
DEV uint32 key_of(float score) {
    uint32 b = bits(score);
    return max(b & 0x80000000u ? ~b : b | 0x80000000u, 1u);
}
DEV float score_of(uint32 key) {
    return isobit::from_bits(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

// Keys of experts in all but the best groups become 0. alone: a group is as good as its best, else
// the second added. group: shared, a key each.
DEV void leave_groups(uint32* key, int experts, int groups, int used, int alone, uint32* group) {
    int size = experts / groups;
    if (int(threadIdx.x) < groups) {
        uint32 best = 0, second = 0;
        for (int e = threadIdx.x * size; e < int(threadIdx.x + 1) * size; e++) {
            second = max(second, min(best, key[e]));
            best = max(best, key[e]);
        }
        group[threadIdx.x] = alone ? best : key_of(add(score_of(best), score_of(second)));
    }
    __syncthreads();
    for (int e = threadIdx.x; e < experts; e += THREADS) {
        int own = e / size, before = 0;
        for (int g = 0; g < groups; g++) before += group[g] > group[own] - (g < own);
        if (before >= used) key[e] = 0;
    }
    __syncthreads();
}

// A token a block. z: logits, or without softmax probabilities; bias: null or one an expert.
// probability: shared, one an expert, then as many keys.
KERNEL(THREADS) router_top_k(const float* z, int experts, int k, int normalise, int softmax,
                             const float* bias, int groups, int groups_used, int* ids,
                             float* weights) {
    begin();
    DYNAMIC_SHARED(float, probability);
    __shared__ float buffer[SUPER];
    __shared__ float maxima[THREADS / WARP];
    __shared__ float chosen[64];
    __shared__ uint32 group[64];
    uint32* key = (uint32*)(probability + experts);
    int token = blockIdx.x;
    z += int64(token) * experts;
    if (softmax) {
        float m = isobit::from_bits(0xff800000u), sum = 0.0f;
        for (int e = threadIdx.x; e < experts; e += THREADS) m = fmaxf(m, z[e]);
        m = warp_max(m);
        if (lane_id() == 0) maxima[warp_id()] = m;
        __syncthreads();
        for (int w = 0; w < THREADS / WARP; w++) m = fmaxf(m, maxima[w]);
        for (int e = threadIdx.x; e < experts; e += THREADS) {
            probability[e] = isobit::exp(sub(z[e], m));
            sum = add(sum, probability[e]);
        }
        float total = block_tree(sum, buffer);
        for (int e = threadIdx.x; e < experts; e += THREADS)
            probability[e] = div(probability[e], total);
    } else {
        for (int e = threadIdx.x; e < experts; e += THREADS) probability[e] = z[e];
    }
    for (int e = threadIdx.x; e < experts; e += THREADS)
        key[e] = key_of(add(probability[e], bias ? bias[e] : 0.0f));
    __syncthreads();
    if (groups_used < groups) leave_groups(key, experts, groups, groups_used, softmax, group);
    // An expert's rank is the number of those before it. Two lanes count for one.
    for (int base = warp_id() * (WARP / 2); base < experts; base += THREADS / 2) {
        int e = base + lane_id() / 2, before = 0;
        // Those below e come first at an equal key, those above it only at a larger one.
        uint32 larger = e < experts ? key[e] : 0u, least = larger - 1;
#pragma unroll 8
        for (int j = lane_id() % 2; j < experts; j += 2)
            before += key[j] > (j < e ? least : larger);
        before += shuffle_xor(before, 1);
        if (larger && before < k && lane_id() % 2 == 0) {
            ids[token * k + before] = e;
            chosen[before] = probability[e];
        }
    }
    __syncthreads();
    if (int(threadIdx.x) < k) {
        float w = chosen[threadIdx.x], all = 0.0f;
        for (int rank = 0; rank < k; rank++) all = add(all, chosen[rank]);
        weights[token * k + threadIdx.x] = normalise ? div(w, all < 0x1p-14f ? 0x1p-14f : all) : w;
    }
}

// A warp's 32 pairs of one turn: each lane's expert, and the lanes that have the same.
struct Pairs {
    int index, expert, before, all;  // before: lanes below this one with its expert
    bool held;

    DEV Pairs(const int* ids, int first, int end) : index(first + lane_id()), held(index < end) {
        expert = held ? ids[index] : -1 - lane_id();
        uint32 same = __match_any_sync(~0u, expert);
        before = __popc(same & (1u << lane_id()) - 1);
        all = __popc(same);
    }
};

// The sum of v over this lane and those below it.
DEV int warp_scan(int v) {
    for (int step = 1; step < WARP; step *= 2) {
        int other = shuffle(v, lane_id() - step & WARP - 1);
        if (lane_id() >= step) v += other;
    }
    return v;
}

// Pairs (token, rank) 0 … n-1 ordered by expert, and where each expert's begin. One block; each of
// the first `parts` warps counts, and then places, a part of the pairs, 32 at a time. Unless null,
// groups gets the pairs of each expert in groups of up to COLUMNS, and n_groups their number.
// count: shared, experts * parts.
KERNEL(1024) sort_pairs(const int* ids, int n, int experts, int parts, int* order, int* offset,
                        ItemGroup* groups, int* n_groups) {
    begin();
    DYNAMIC_SHARED(int, count);
    __shared__ int totals[1024 / WARP];
    int part = warp_id(), share = (n + parts - 1) / parts;
    int begin = part * share, end = part < parts ? min(n, begin + share) : 0;
    for (int i = threadIdx.x; i < experts * parts; i += blockDim.x) count[i] = 0;
    __syncthreads();
    for (int first = begin; first < end; first += WARP) {
        Pairs p(ids, first, end);
        if (p.held && p.before == 0) count[p.expert * parts + part] += p.all;
        __syncwarp();
    }
    __syncthreads();
    int sum = 0;  // counts to places
    for (int base = 0; base < experts * parts; base += blockDim.x) {
        int i = base + threadIdx.x, mine = i < experts * parts ? count[i] : 0;
        int upto = warp_scan(mine);
        if (lane_id() == WARP - 1) totals[warp_id()] = upto;
        __syncthreads();
        int warps = warp_scan(totals[lane_id()]);
        int below = shuffle(warps, max(warp_id() - 1, 0));
        if (i < experts * parts) count[i] = sum + upto - mine + (warp_id() ? below : 0);
        sum += shuffle(warps, WARP - 1);
        __syncthreads();
    }
    for (int e = threadIdx.x; e <= experts; e += blockDim.x)
        offset[e] = e < experts ? count[e * parts] : n;
    if (groups && warp_id() == WARP - 1) {
        int before = 0;  // groups of experts below
        for (int base = 0; base < experts; base += WARP) {
            int e = base + lane_id(), first = e < experts ? count[e * parts] : n;
            int end = e + 1 < experts ? count[(e + 1) * parts] : n;
            int mine = (end - first + COLUMNS - 1) / COLUMNS, upto = warp_scan(mine);
            ItemGroup* to = groups + before + upto - mine;
            for (int i = first; i < end; i += COLUMNS) *to++ = {e, i, min(COLUMNS, end - i), 0};
            before += shuffle(upto, WARP - 1);
        }
        if (lane_id() == 0) *n_groups = before;
    }
    __syncthreads();
    for (int first = begin; first < end; first += WARP) {
        Pairs p(ids, first, end);
        int at = p.held ? count[p.expert * parts + part] : 0;
        __syncwarp();
        if (p.held) order[at + p.before] = p.index;
        if (p.held && p.before == 0) count[p.expert * parts + part] = at + p.all;
        __syncwarp();
    }
}
