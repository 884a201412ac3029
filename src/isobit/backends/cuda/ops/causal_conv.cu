// Causal convolution, each channel by itself (docs/numerics.md, section 12). TAPS: rows that it sees.
#include "sequence_chunks.cuh"

// A channel a thread, a run of tokens a block (blockIdx.y). state: the last TAPS - 1 rows of each
// sequence, oldest first.
KERNEL(THREADS) causal_conv(const float* x, int64 stride, const float* taps, int channels,
                            const SequenceChunk* chunks, const int* positions, float* state, float* y) {
    begin();
    int c = blockIdx.x * THREADS + threadIdx.x;
    if (c >= channels) return;
    SequenceChunk chunk = chunks[blockIdx.y];
    float w[TAPS], row[TAPS] = {};  // row: the last is the token's
    float* kept = state + int64(chunk.state) * (TAPS - 1) * channels + c;
    bool begins = positions[chunk.first] == 0;
#pragma unroll
    for (int i = 0; i < TAPS; i++) {
        w[i] = taps[c * TAPS + i];
        if (i && !begins) row[i] = kept[int64(i - 1) * channels];
    }
#pragma unroll 8
    for (int t = chunk.first; t < chunk.first + chunk.count; t++) {
#pragma unroll
        for (int i = 1; i < TAPS; i++) row[i - 1] = row[i];
        row[TAPS - 1] = x[t * stride + c];
        float sum = mul(row[0], w[0]);
#pragma unroll
        for (int i = 1; i < TAPS; i++) sum = add(sum, mul(row[i], w[i]));
        y[int64(t) * channels + c] = sum;
    }
#pragma unroll
    for (int i = 1; i < TAPS; i++) kept[int64(i - 1) * channels] = row[i];
}
