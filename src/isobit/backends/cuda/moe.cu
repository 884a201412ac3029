// Router and weighted sum of experts (docs/numerics.md, section 7), and tokens sorted by expert.
#include "common.cuh"

// A token a block. probability: shared, one float an expert.
KERNEL(THREADS) router_top_k(const float* logits, int experts, int k, int normalise,
                             int* ids, float* weights) {
    DYNAMIC_SHARED(float, probability);
    __shared__ float buffer[SUPER];
    __shared__ float maxima[THREADS / WARP];
    __shared__ unsigned long long best[THREADS / WARP];
    __shared__ float chosen[64];
    int token = blockIdx.x;
    logits += int64(token) * experts;
    float m = isobit::from_bits(0xff800000u), sum = 0.0f;
    for (int e = threadIdx.x; e < experts; e += THREADS) m = fmaxf(m, logits[e]);
    m = warp_max(m);
    if (lane_id() == 0) maxima[warp_id()] = m;
    __syncthreads();
    for (int w = 0; w < THREADS / WARP; w++) m = fmaxf(m, maxima[w]);
    for (int e = threadIdx.x; e < experts; e += THREADS) {
        probability[e] = isobit::exp(sub(logits[e], m));
        sum = add(sum, probability[e]);
    }
    float total = block_tree(sum, buffer);
    for (int e = threadIdx.x; e < experts; e += THREADS)
        probability[e] = div(probability[e], total);
    for (int rank = 0; rank < k; rank++) {
        // The largest probability, the lower index among equals; 0 marks an expert as taken.
        unsigned long long key = 0;
        for (int e = threadIdx.x; e < experts; e += THREADS) {
            float p = probability[e];
            if (p >= 0.0f)
                key = max(key, (unsigned long long)(bits(p)) << 32 | (0xffffffffu - uint32(e)));
        }
        for (int n = 16; n; n /= 2) key = max(key, shuffle_xor(key, n));
        if (lane_id() == 0) best[warp_id()] = key;
        __syncthreads();
        for (int w = 0; w < THREADS / WARP; w++) key = max(key, best[w]);
        int e = key ? int(0xffffffffu - uint32(key)) : 0;
        if (e % THREADS == int(threadIdx.x)) {
            ids[token * k + rank] = e;
            chosen[rank] = key ? probability[e] : 0.0f;
            probability[e] = -1.0f;
        }
        __syncthreads();
    }
    if (int(threadIdx.x) < k) {
        float w = chosen[threadIdx.x], all = 0.0f;
        for (int rank = 0; rank < k; rank++) all = add(all, chosen[rank]);
        weights[token * k + threadIdx.x] = normalise ? div(w, all) : w;
    }
}

// Pairs (token, rank) 0 … n-1 ordered by expert, and where each expert's begin. One block.
KERNEL(1024) sort_pairs(const int* ids, int n, int experts, int* order, int* offset) {
    DYNAMIC_SHARED(int, count);
    for (int e = threadIdx.x; e < experts; e += blockDim.x) {
        int c = 0;
        for (int i = 0; i < n; i++) c += ids[i] == e;
        count[e] = c;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        offset[0] = 0;
        for (int e = 0, sum = 0; e < experts; e++) offset[e + 1] = sum += count[e];
    }
    __syncthreads();
    for (int e = threadIdx.x; e < experts; e += blockDim.x) {
        int at = offset[e];
        for (int i = 0; i < n; i++)
            if (ids[i] == e) order[at++] = i;
    }
}

// out = ((0 + w_1 * y_1) + w_2 * y_2) + …, a token a block (blockIdx.x).
KERNEL(THREADS) combine(const float* weights, const float* y, int k, int n, float* out) {
    int64 token = blockIdx.x;
    for (int i = threadIdx.x; i < n; i += THREADS) {
        float sum = 0.0f;
        for (int r = 0; r < k; r++)
            sum = add(sum, mul(weights[token * k + r], y[(token * k + r) * n + i]));
        out[token * n + i] = sum;
    }
}
