// A decode step: the gated delta rule (docs/numerics.md, section 12), from the convolved channels to what the state
// gives. HEADS value heads, KV_HEADS key heads, HEAD_DIM values of each; TOGETHER: value heads, one behind the
// other, of a key head.
#include "expert_prefetch.cuh"
#include "delta_rule.cuh"
#include "sequence_chunks.cuh"

constexpr int EACH = HEAD_DIM / WARP, COLUMNS = 32, OF_WARP = COLUMNS / WARPS;  // columns of a block, of a warp
constexpr int PARTS = HEAD_DIM / COLUMNS;
static_assert(HEAD_DIM % COLUMNS == 0 && HEAD_DIM <= SUPER, "rows of a lane, columns of a block");

// made: of key heads q, then k; of value heads v, then the output gate; beta and alpha of each. Blocks: COLUMNS of a
// value head's state, HEADS * PARTS. While made is on its way, the experts are predicted (expert_prefetch.cuh).
KERNEL(512) decode_delta(const float* made, const float* dt, const float* a, float eps, float q_scale, float k_scale,
                         const SequenceChunk* chunks, const int* positions, float* state, float* y,
                         const uint8* router, const float* ffn_norm, const int* step_number, uint64* prediction,
                         const float* x) {
    int head = blockIdx.x / PARTS, column = blockIdx.x % PARTS * COLUMNS + warp_id() * OF_WARP;
    int key_head = head / TOGETHER % KV_HEADS;
    state += ((int64(chunks->state) * HEADS + head) * HEAD_DIM + column) * HEAD_DIM + lane_id();
    bool begins = *positions == 0;
    float s[OF_WARP][EACH], q[EACH], k[EACH];
#pragma unroll
    for (int c = 0; c < OF_WARP; c++)
#pragma unroll
        for (int i = 0; i < EACH; i++) s[c][i] = begins ? 0.0f : state[c * HEAD_DIM + i * WARP];
    float bias = dt[head], rate = a[head];
    let_next_start();
#if EXPERTS
    __shared__ PredictorShared predicting;
    ExpertPredictor{router, ffn_norm}.make(x, *step_number, &predicting, prediction);
#endif
    wait_for_previous();
    const float* v = made + 2 * KV_HEADS * HEAD_DIM;
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        q[i] = made[key_head * HEAD_DIM + lane_id() + i * WARP];
        k[i] = made[(KV_HEADS + key_head) * HEAD_DIM + lane_id() + i * WARP];
    }
    int own = column + lane_id() / (WARP / OF_WARP);  // of the lane's result
    float value = v[head * HEAD_DIM + own];
    float beta = v[2 * HEADS * HEAD_DIM + head], alpha = v[2 * HEADS * HEAD_DIM + HEADS + head];
    l2_norm<HEAD_DIM>(q, eps, q_scale);
    l2_norm<HEAD_DIM>(k, eps, k_scale);
    float keep = isobit::exp(log_decay(alpha, bias, rate));
    float o = delta_step<HEAD_DIM, true>(s, q, k, value, sigmoid(beta), keep);
    if (lane_id() % (WARP / OF_WARP) == 0) y[head * HEAD_DIM + own] = o;
#pragma unroll
    for (int c = 0; c < OF_WARP; c++)
#pragma unroll
        for (int i = 0; i < EACH; i++) state[c * HEAD_DIM + i * WARP] = s[c][i];
}
