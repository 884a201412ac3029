// Expert prefetch: the experts that a layer will choose are predicted while its attention has yet to run,
// from what the router would say of the residual stream as it is before attention. The memory is idle
// then, and has the predicted experts' weights ready when the router has spoken. Only time depends on
// the prediction: the choice itself is decode_gate_up's.
//
// A layer has a word that says that its input is there, and, for each row, one for each expert with its
// logit, each with the number of the step that published it.
#pragma once
#include "decode.cuh"
#include "copy.cuh"
#include "formats.cuh"

#if EXPERTS
// A word of this step, or what is there after so many reads. Blocks of one kernel wait for one another
// only so long (tens of microseconds), since nothing says that all of them run at once.
constexpr int MAX_POLLS = 200, POLL_FOREVER = -2;
template <int READS>
DEV uint64 wait_published(const uint64* word, int number) {
    uint64 one = load_relaxed(word);
    for (int i = 0; i != READS && !is_of(one, number); i++) one = load_relaxed(word);
    return one;
}

// The same of the words of all experts, a lane's share (every 32nd), all of them asked for at once.
constexpr int EXPERTS_EACH = (EXPERTS + WARP - 1) / WARP;
template <int READS>
DEV void wait_all_published(const uint64* words, int number, uint64 (&one)[EXPERTS_EACH]) {
    bool missing = true;
    for (int read = 0; missing && read != READS + 1; read++) {
        missing = false;
#pragma unroll
        for (int i = 0; i < EXPERTS_EACH; i++)
            if (i * WARP + lane_id() < EXPERTS && (read == 0 || !is_of(one[i], number)))
                one[i] = load_relaxed(words + i * WARP + lane_id());
#pragma unroll
        for (int i = 0; i < EXPERTS_EACH; i++)
            missing |= i * WARP + lane_id() < EXPERTS && !is_of(one[i], number);
    }
}

struct PredictorShared {
    float part[ROWS][WARPS];
};
// The experts' logits, shared out to the blocks. Any order of their sums will do, and the norm's factor
// changes no rank.
struct ExpertPredictor {
    static constexpr int EACH = (HIDDEN + BLOCK - 1) / BLOCK;
    const uint8* router;
    const float* norm;
    float weight[EACH];

    DEV void fetch(int expert) {
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            int k = i * BLOCK + threadIdx.x;
            if (k < HIDDEN)
                weight[i] = norm[k] * load_float(router, int64(expert) * HIDDEN + k, ROUTER_KIND);
        }
    }
    // words[0] is published once x is the layer's input; the experts' words are published here.
    DEV void make(const float* x, int number, PredictorShared* sh, uint64* words) {
        if (blockIdx.x >= EXPERTS) return;
        fetch(blockIdx.x);
        if (threadIdx.x == 0) wait_published<MAX_POLLS>(words, number);
        __syncthreads();
#pragma unroll 1
        for (int expert = blockIdx.x; expert < EXPERTS; expert += gridDim.x) {
            if (expert != blockIdx.x) fetch(expert);
            float sum[ROWS];
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                sum[r] = 0.0f;
#pragma unroll
                for (int i = 0; i < EACH; i++) {
                    int k = i * BLOCK + threadIdx.x;
                    if (k < HIDDEN) sum[r] += load_fresh(x + r * HIDDEN + k) * weight[i];
                }
            }
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                sum[r] = warp_tree(sum[r]);
                if (lane_id() == 0) sh->part[r][warp_id()] = sum[r];
            }
            __syncthreads();
            if (lane_id() == 0 && warp_id() < ROWS) {
                float all = sh->part[warp_id()][0];
                for (int i = 1; i < WARPS; i++) all += sh->part[warp_id()][i];
                store_relaxed(words + 1 + warp_id() * EXPERTS + expert, packed(number, expert, all));
            }
            __syncthreads();
        }
    }
};

// Lane i < USED gets the expert with the i-th largest predicted logit of a row, whose words follow words[0]; by one
// warp. Blocks that wait until all is published get the same.
template <int READS>
DEV int predicted_experts(const uint64* words, int number) {
    constexpr int EACH = EXPERTS_EACH, MASK = 1023;
    static_assert(EXPERTS < MASK, "the bits that name an expert; decode_layer.py asks for it");
    uint64 one[EACH];
    wait_all_published<READS>(words + 1, number, one);
    uint32 logit[EACH];  // ordered as the floats are, then 1 + expert; 0: not to be had
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        int expert = i * WARP + lane_id();
        logit[i] = expert < EXPERTS ? 1 + expert : 0;
        if (expert >= EXPERTS) continue;
        uint32 b = bits(chosen_weight(one[i]));
        if (is_of(one[i], number)) logit[i] |= (b >> 31 ? ~b : b | 0x80000000u) & ~MASK;
    }
    int mine = 0;
#pragma unroll 1
    for (int r = 0; r < USED; r++) {
        uint32 top = 0;
#pragma unroll
        for (int i = 0; i < EACH; i++) top = max(top, logit[i]);
        top = warp_max(top);
#pragma unroll
        for (int i = 0; i < EACH; i++)
            if (logit[i] == top) logit[i] = 0;
        if (lane_id() == r) mine = int(top & MASK) - 1;
    }
    return mine;
}

// This block's share of the experts' matrices of one kind into the device's shared cache; by one warp,
// with an expert in each of USED lanes.
DEV void prefetch_experts(const uint8* matrices, int64 bytes, int expert) {
    uint32 lines = (uint32(bytes) + 255) / 256, part = (lines + gridDim.x - 1) / gridDim.x * 256;
    int64 begin = int64(part) * blockIdx.x, n = bytes - begin < part ? bytes - begin : part;
    if (lane_id() < USED && n > 0) prefetch_bulk(matrices + expert * bytes + begin, int(n));
}
#endif
