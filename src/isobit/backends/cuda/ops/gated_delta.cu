// Gated delta rule (docs/numerics.md, section 12). ROWS: values of a key, a power of two; COLUMNS: of a warp, 1 with
// fewer ROWS than 32; CORRECTS: whether what the state has of a key is taken off its value.
#include "delta_rule.cuh"
#include "sequence_chunks.cuh"
#include "views.cuh"

constexpr int AT_HAND = 4;  // tokens that registers hold: what one takes to compute is less than what it takes to fetch
constexpr int EACH = (ROWS + WARP - 1) / WARP, LANES = ROWS < WARP ? ROWS : WARP;

// COLUMNS of a head's state a warp (blockIdx.x, in eights of them), blockIdx.y the head, blockIdx.z the run. together:
// value heads, one behind the other, of a key head. state: of each sequence [heads][columns][ROWS].
KERNEL(THREADS) gated_delta(const float* q, int64 q_stride, int q_step, const float* k,
                            int64 k_stride, int k_step, const float* v, int64 v_stride, int v_step,
                            const float* beta, int64 beta_stride, const float* g, int64 g_stride,
                            int key_heads, int together, int heads, int columns, const SequenceChunk* chunks,
                            const int* positions, float* state, float* y) {
    begin();
    int head = blockIdx.y, first = (blockIdx.x * (THREADS / WARP) + warp_id()) * COLUMNS;
    int lane = lane_id() % LANES, column = first + lane_id() / (WARP / COLUMNS);  // of the lane's result
    if (first >= columns) return;
    SequenceChunk chunk = chunks[blockIdx.z];
    float* kept = state + ((int64(chunk.state) * heads + head) * columns + first) * ROWS + lane;
    bool begins = positions[chunk.first] == 0;
    float s[COLUMNS][EACH], q_row[AT_HAND][EACH], k_row[AT_HAND][EACH];
    float value[AT_HAND], rate[AT_HAND], keep[AT_HAND];
#pragma unroll
    for (int c = 0; c < COLUMNS; c++)
#pragma unroll
        for (int i = 0; i < EACH; i++) s[c][i] = begins ? 0.0f : kept[c * ROWS + i * WARP];
    int key_head = head / together % key_heads;
    q += key_head * q_step + lane;
    k += key_head * k_step + lane;
    v += head * v_step + column;
    auto fetch = [&](int t, int to) {
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            q_row[to][i] = q[t * q_stride + i * WARP];
            k_row[to][i] = k[t * k_stride + i * WARP];
        }
        value[to] = v[t * v_stride];
        rate[to] = beta[t * beta_stride + head];
        keep[to] = g[t * g_stride + head];
    };
    auto token = [&](int t, int at) {
        float o = delta_step<ROWS, CORRECTS>(s, q_row[at], k_row[at], value[at], rate[at], isobit::exp(keep[at]));
        if (lane_id() % (WARP / COLUMNS) == 0) y[(int64(t) * heads + head) * columns + column] = o;
    };
    int end = chunk.first + chunk.count;
#pragma unroll
    for (int i = 0; i < AT_HAND - 1; i++) fetch(min(chunk.first + i, end - 1), i);
#pragma unroll 1
    for (int t = chunk.first; t < end; t += AT_HAND) {
#pragma unroll
        for (int i = 0; i < AT_HAND; i++) {
            if (t + i >= end) break;
            fetch(min(t + i + AT_HAND - 1, end - 1), (i + AT_HAND - 1) % AT_HAND);
            token(t + i, i);
        }
    }
#pragma unroll
    for (int c = 0; c < COLUMNS; c++)
#pragma unroll
        for (int i = 0; i < EACH; i++)
            if (lane_id() < LANES) kept[c * ROWS + i * WARP] = s[c][i];
}
