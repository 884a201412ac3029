// The choice of a token's experts (docs/numerics.md, section 7), by a warp.
// PARTS: of the experts, 32 each; lane l of a warp has l, l + 32, … of them. GROUPED: not all of the
// experts' groups are used.
#pragma once
#include "common.cuh"

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
