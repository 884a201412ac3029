// What the gated delta rule reads of a delta net's products (docs/numerics.md, section 12): head vectors after the
// convolution and SiLU, q and k with L2 norm 1 times a scale; then beta and decay of each value head.
// HEADS value heads, KV_HEADS key heads, HEAD_DIM values of each; TAPS: of the convolution.
#include "delta_rule.cuh"
#include "sequence_chunks.cuh"

// Values of a lane; tokens of a warp, and how many are on their way; rows of a state.
constexpr int EACH = HEAD_DIM / WARP, RUN = 8, AHEAD = 3, KEPT = TAPS - 1;
constexpr int VECTORS = 2 * KV_HEADS + HEADS, CHANNELS = VECTORS * HEAD_DIM;
constexpr int MADE = CHANNELS + HEADS * HEAD_DIM + 2 * HEADS, WIDTH = CHANNELS + 2 * HEADS;

// A channel of a chunk's sequence, so many rows from the chunk's first; before it, as the state has it.
struct Rows {
    const float *made, *state;
    SequenceChunk chunk;
    bool begins;

    DEV Rows(const float* made, const float* state, SequenceChunk chunk, const int* positions)
        : made(made), state(state + int64(chunk.state) * KEPT * CHANNELS), chunk(chunk),
          begins(positions[chunk.first] == 0) {}
    DEV float operator()(int row, int channel) const {
        if (row >= 0) return made[int64(chunk.first + row) * MADE + channel];
        return begins ? 0.0f : state[(KEPT + row) * CHANNELS + channel];
    }
};

// RUN tokens (blockIdx.x) of a head vector a warp (blockIdx.y, in eights), the last for beta and decay.
KERNEL(THREADS) delta_inputs(const float* made, const float* taps, const float* dt, const float* a, float eps,
                             float q_scale, float k_scale, const SequenceChunk* chunks, const int* positions,
                             const float* state, int sequences, int tokens, float* out) {
    int vector = blockIdx.y * (THREADS / WARP) + warp_id(), first = blockIdx.x * RUN;
    if (vector > VECTORS) return;
    int end = min(first + RUN, tokens);
    if (vector == VECTORS) {
        begin();
        for (int i = lane_id(); i < (end - first) * HEADS; i += WARP) {
            int64 t = first + i / HEADS;
            int head = i % HEADS;
            const float* x = made + (t + 1) * MADE - 2 * HEADS + head;
            float* y = out + t * WIDTH + CHANNELS + head;
            y[0] = sigmoid(x[0]);
            y[HEADS] = log_decay(x[HEADS], dt[head], a[head]);
        }
        return;
    }
    float x[AHEAD][EACH], w[TAPS][EACH], row[TAPS][EACH];  // row: the last is the token's
    int channel = vector * HEAD_DIM + lane_id();
    auto fetch = [&](int t, float (&to)[EACH]) {
#pragma unroll
        for (int i = 0; i < EACH; i++) to[i] = made[int64(min(t, end - 1)) * MADE + channel + i * WARP];
    };
    // What no kernel ahead makes comes before the wait for them. A state is of the pass before, whose rule has waited
    // for who wrote it.
#pragma unroll
    for (int j = 0; j < TAPS; j++)
#pragma unroll
        for (int i = 0; i < EACH; i++) w[j][i] = taps[(channel + i * WARP) * TAPS + j];
    int c = 0;  // the first token's chunk: as many end before it
    for (int base = 0; base < sequences; base += WARP) {
        int at = min(base + lane_id(), sequences - 1);
        bool before = base + lane_id() < sequences && chunks[at].first + chunks[at].count <= first;
        c += __popc(__ballot_sync(~0u, before));
    }
    int next = first;  // token of the next chunk
    auto begin_chunk = [&](int t) {
        Rows rows(made, state, chunks[c++], positions);
        next = rows.chunk.first + rows.chunk.count;
#pragma unroll
        for (int j = 1; j < TAPS; j++)
#pragma unroll
            for (int i = 0; i < EACH; i++) row[j][i] = rows(t - rows.chunk.first - TAPS + j, channel + i * WARP);
    };
    if (chunks[c].first == first) begin_chunk(first);
    begin();
#pragma unroll
    for (int n = 0; n < AHEAD; n++) fetch(first + n, x[n]);
#pragma unroll 1
    for (int t = first; t < end; t++) {
        if (t == next) begin_chunk(t);
        float y[EACH];
#pragma unroll
        for (int i = 0; i < EACH; i++) {
#pragma unroll
            for (int j = 1; j < TAPS; j++) row[j - 1][i] = row[j][i];
            row[KEPT][i] = x[0][i];
#pragma unroll
            for (int n = 1; n < AHEAD; n++) x[n - 1][i] = x[n][i];
            float sum = mul(row[0][i], w[0][i]);
#pragma unroll
            for (int j = 1; j < TAPS; j++) sum = add(sum, mul(row[j][i], w[j][i]));
            y[i] = div(sum, add(1.0f, isobit::exp(-sum)));
        }
        fetch(t + AHEAD, x[AHEAD - 1]);
        if (vector < 2 * KV_HEADS) l2_norm<HEAD_DIM>(y, eps, vector < KV_HEADS ? q_scale : k_scale);
#pragma unroll
        for (int i = 0; i < EACH; i++) out[int64(t) * WIDTH + channel + i * WARP] = y[i];
    }
}

// The last rows of each sequence (blockIdx.y), oldest first; a channel a thread.
KERNEL(THREADS) keep_rows(const float* made, const SequenceChunk* chunks, const int* positions, float* state) {
    begin();
    int channel = blockIdx.x * THREADS + threadIdx.x;
    if (channel >= CHANNELS) return;
    Rows rows(made, state, chunks[blockIdx.y], positions);
    float row[KEPT];
#pragma unroll
    for (int j = 0; j < KEPT; j++) row[j] = rows(rows.chunk.count - KEPT + j, channel);
    state += int64(rows.chunk.state) * KEPT * CHANNELS;
#pragma unroll
    for (int j = 0; j < KEPT; j++) state[j * CHANNELS + channel] = row[j];
}
