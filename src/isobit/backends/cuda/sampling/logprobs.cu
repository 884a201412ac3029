// What rows of logits say of their next tokens, and tokens drawn from them, made where the logits lie: sections 10
// and 11 of docs/numerics.md. A piece of a row, PIECE values, is one block's; sums are integers, so no order matters.
#include "logprobs.cuh"

// The k largest of the keys of a piece, in order, into `keys`: k for each piece of a row. from: the keys of this
// kernel for smaller pieces, n of a row; null: those of n logits. A row that is not finite has the key BROKEN; masked:
// minus infinity is no logit, and a row of nothing else has the key 0.
KERNEL(256) best(const float* logits, const uint64* from, int n, int k, uint64* keys, int masked) {
    begin();
    __shared__ uint64 buffer[2][WARPS];
    uint64 mine[EACH];
    for (int j = 0; j < EACH; j++) {
        int i = blockIdx.x * PIECE + j * BLOCK + threadIdx.x;
        int64 at = int64(blockIdx.y) * n + i;
        mine[j] = 0;
        if (i < n && from) mine[j] = from[at];
        if (i < n && !from) {
            float z = logits[at];
            mine[j] = magnitude(z) < 0x7f800000u ? rank_key(z, i) : BROKEN;
            if (masked && bits(z) == 0xff800000u) mine[j] = 0;
        }
    }
    uint64* out = keys + (int64(blockIdx.y) * gridDim.x + blockIdx.x) * k;
    for (int rank = 0; rank < k; rank++) {
        uint64 key = 0;
        for (int j = 0; j < EACH; j++) key = max(key, mine[j]);
        key = block_best<WARPS>(key, buffer[rank % 2]);
        for (int j = 0; j < EACH; j++) mine[j] = mine[j] == key ? 0 : mine[j];
        if (threadIdx.x == 0) out[rank] = key;
    }
}

// The sums of the weights of each piece of each row. keys: of the largest logits, k of a row.
KERNEL(256) weigh(const float* logits, int n, const uint64* keys, int k, uint64* sums) {
    begin();
    __shared__ Sums buffer[WARPS];
    const uint64 key = keys[int64(blockIdx.y) * k];
    const float* z = logits + int64(blockIdx.y) * n;
    const float most = key == BROKEN ? 0.0f : z[index_of(key)];
    Sums sum = {0, 0};
    for (int j = 0; j < EACH; j++) {
        int i = blockIdx.x * PIECE + j * BLOCK + threadIdx.x;
        if (i < n && key != BROKEN) sum.weight += isobit::weight(bits(isobit::exp_of_negative(sub(z[i], most))));
    }
    sum = block_sum(sum, buffer);
    if (threadIdx.x == 0) sums[int64(blockIdx.y) * gridDim.x + blockIdx.x] = sum.weight;
}

// A row of `found`, a row a block: the argmax, the log-probabilities of `given` ids, the k most likely ids and
// theirs in turn, then a drawn token (there already), and its. Of a row that is not finite -1 and NaN. ids: of each row.
KERNEL(256) measured(const float* logits, int n, const uint64* keys, int stride, const uint64* sums, int pieces,
                     const int* ids, int given, int k, int drawn, int* found, int width) {
    begin();
    __shared__ Sums buffer[WARPS];
    const float* z = logits + int64(blockIdx.x) * n;
    const uint64* best = keys + int64(blockIdx.x) * stride;
    int* out = found + int64(blockIdx.x) * width;
    const bool finite = best[0] != BROKEN;
    const float most = finite ? z[index_of(best[0])] : 0.0f;
    Sums sum = {0, 0};
    if (given + k + drawn)
        for (int i = threadIdx.x; i < pieces; i += BLOCK) sum.weight += sums[int64(blockIdx.x) * pieces + i];
    const float all = log_total(block_sum(sum, buffer).weight);
    auto logprob = [&](int id) {
        float x = sub(z[id], most);
        return finite ? bits(sub(bits(x) == 0xff800000u ? isobit::from_bits(0xff7fffffu) : x, all)) : 0x7fc00000u;
    };
    if (threadIdx.x == 0) out[0] = finite ? index_of(best[0]) : -1;
    for (int i = threadIdx.x; i < given; i += BLOCK)
        out[1 + i] = int(logprob(ids[int64(blockIdx.x) * given + i]));
    for (int i = threadIdx.x; i < k; i += BLOCK) {
        int id = finite ? index_of(best[i]) : -1;
        out[1 + given + 2 * i] = id;
        out[2 + given + 2 * i] = int(logprob(max(id, 0)));
    }
    if (drawn && threadIdx.x == 0) {
        int* token = out + 1 + given + 2 * k;
        token[1] = int(token[0] < 0 || token[0] >= n ? 0x7fc00000u : logprob(token[0]));
    }
}
