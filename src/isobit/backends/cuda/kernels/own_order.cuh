// Pairs of tokens and the experts that these chose, put in order by each block of a kernel for itself.
#pragma once
#include "sorted_pairs.cuh"

constexpr int MOST_WARPS = 1024 / WARP;

// As sort_pairs of top_k.cu has them: in groups of up to COLUMNS of an expert, of experts that are at most one a
// thread. All blocks have to find the same, as they share the work on each group. BLOCK: threads;
// OWN_ORDER: pairs of each.
struct Order {
    int pairs, experts, each, words;  // each: experts of a token
    int *begin, *sums, *pair;         // shared: of an expert; of a warp, and the number of groups; pairs by expert
    uint32* tokens;                   // shared: of an expert, a bit for each that chose it
    PairGroup* groups;                // shared
    int id[OWN_ORDER];

    DEV Order(int pairs, int experts, int each, uint8* memory) : pairs(pairs), experts(experts), each(each) {
        words = (uint32(pairs) / each + WARP - 1) / WARP;
        groups = reinterpret_cast<PairGroup*>(memory);
        begin = reinterpret_cast<int*>(groups + min(pairs, experts + pairs / COLUMNS));
        sums = begin + experts;
        pair = sums + MOST_WARPS + 1;
        tokens = reinterpret_cast<uint32*>(pair + pairs);
#pragma unroll 1
        for (int i = threadIdx.x; i < experts * words; i += BLOCK) tokens[i] = 0;
        __syncthreads();
    }
    // Returns how many groups there are.
    DEV int make(const int* ids) {
#pragma unroll
        for (int i = 0; i < OWN_ORDER; i++) {
            int p = threadIdx.x + i * BLOCK;
            id[i] = p < pairs ? ids[p] : -1;
        }
#pragma unroll
        for (int i = 0; i < OWN_ORDER; i++)
            if (id[i] >= 0) atomicOr(word(i), bit(i));
        __syncthreads();
        int e = threadIdx.x, mine = 0;
        if (e < experts)
#pragma unroll 1
            for (int w = 0; w < words; w++) mine += __popc(tokens[e * words + w]);
        int in_groups = (mine + COLUMNS - 1) / COLUMNS, upto = warp_scan(mine | in_groups << 16);
        if (lane_id() == WARP - 1) sums[warp_id()] = upto;
        __syncthreads();
        if (e < experts) {
#pragma unroll 1
            for (int w = 0; w < warp_id(); w++) upto += sums[w];
            int end = upto & 0xffff, first = end - mine;
            PairGroup* to = groups + (upto >> 16) - in_groups;
            begin[e] = first;
#pragma unroll 1
            for (int i = first; i < end; i += COLUMNS) *to++ = {e, i, min(COLUMNS, end - i), 0};
            if (e == experts - 1) sums[MOST_WARPS] = upto >> 16;
        }
        __syncthreads();
        return sums[MOST_WARPS];
    }
    DEV void place() {
#pragma unroll
        for (int i = 0; i < OWN_ORDER; i++) {
            if (id[i] < 0) continue;
            int at = begin[id[i]] + __popc(*word(i) & bit(i) - 1);
#pragma unroll 1
            for (uint32* w = tokens + id[i] * words; w < word(i); w++) at += __popc(*w);
            pair[at] = threadIdx.x + i * BLOCK;
        }
        __syncthreads();
    }

   private:
    DEV int token(int i) const { return uint32(threadIdx.x + i * BLOCK) / uint32(each); }
    DEV uint32* word(int i) const { return tokens + id[i] * words + token(i) / WARP; }
    DEV uint32 bit(int i) const { return 1u << token(i) % WARP; }
};
