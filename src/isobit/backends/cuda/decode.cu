// One token through one layer, and the output product, in six kernels and one (docs/numerics.md,
// section 9). Attention is in decode_attention.cu. Every kernel runs on one block a multiprocessor.
//
// QK_WEIGHT, V_WEIGHT, OUT_WEIGHT, GATE_WEIGHT, DOWN_WEIGHT, HEAD_WEIGHT: a struct of tiles.cuh each.
// ROUTER_KIND: the router's float kind. EXPERTS is 0 for a dense feed-forward, and USED then 1.
#include "decode.cuh"
#include "formats.cuh"
#include "merge.cuh"

// Norm, quantisation and the products with W_q, W_k, W_v.
struct QueryKey {
    const uint8 *q, *k;
    static constexpr int Q_GROUPS = HEADS * HEAD_DIM / TILE_ROWS;
    static constexpr int GROUPS = Q_GROUPS + KV_HEADS * HEAD_DIM / TILE_ROWS;
    DEV int group(int unit) const { return blockIdx.x + unit * gridDim.x; }
    DEV const uint8* tile(int j) const {
        int g = group(j / HIDDEN_SUPERS), s = j % HIDDEN_SUPERS;
        const uint8* matrix = g < Q_GROUPS ? q : k;
        if (g >= Q_GROUPS) g -= Q_GROUPS;
        return matrix + (int64(g) * HIDDEN_SUPERS + s) * QK_WEIGHT::TILE_BYTES;
    }
    DEV int act(int j) const { return j % HIDDEN_SUPERS; }
};
struct Value {
    const uint8* v;
    static constexpr int GROUPS = KV_HEADS * HEAD_DIM / TILE_ROWS;
    // Dealt on from where the groups of q and k ended, so that no block gets one more of both.
    DEV int turn() const { return (blockIdx.x + gridDim.x - QueryKey::GROUPS % gridDim.x) % gridDim.x; }
    DEV int count() const { return (GROUPS - turn() + int(gridDim.x) - 1) / int(gridDim.x); }
    DEV int group(int unit) const { return turn() + unit * gridDim.x; }
    DEV const uint8* tile(int j) const {
        return v + (int64(group(j / HIDDEN_SUPERS)) * HIDDEN_SUPERS + j % HIDDEN_SUPERS) *
                       V_WEIGHT::TILE_BYTES;
    }
    DEV int act(int j) const { return j % HIDDEN_SUPERS; }
};
struct QkvShared {
    Act x[HIDDEN_SUPERS];
    __align__(16) float normed[HIDDEN];
    float buffer[SUPER];
    __align__(16) uint8 tail[16];
};
KERNEL(THREADS) decode_qkv(const float* x, const float* norm, float eps, const uint8* q,
                           const uint8* k, const uint8* v, float* qkv) {
    DYNAMIC_SHARED(QkvShared, sh);
    float weight[HIDDEN_SUPERS];
    QueryKey qk = {q, k};
    Value value = {v};
    int n = dealt(QueryKey::GROUPS), nv = value.count();
    using First = Products<QK_WEIGHT, QueryKey, DEPTH_QK>;
    using Second = Products<V_WEIGHT, Value, DEPTH_V>;
    uint8* more = sh->tail + First::slot_bytes(n * HIDDEN_SUPERS);
    First first(qk, sh->tail, n * HIDDEN_SUPERS, warp_id());
    Second second(value, more, nv * HIDDEN_SUPERS, WARPS - 1 - warp_id());
    float* part = reinterpret_cast<float*>(more + Second::slot_bytes(nv * HIDDEN_SUPERS));
    fetch_norm(norm, weight);
    let_next_start();
    wait_for_previous();
    norm_to_shared(x, weight, eps, sh->normed, sh->buffer);
    quantise_supers(sh->normed, HIDDEN_SUPERS, sh->x);
    __syncthreads();
    first.run(sh->x, part);
    second.run(sh->x, part + n * HIDDEN_SUPERS * TILE_ROWS);
    __syncthreads();
    for (int i = threadIdx.x; i < (n + nv) * TILE_ROWS; i += THREADS) {
        int unit = i / TILE_ROWS, row = i % TILE_ROWS;
        int group = unit < n ? qk.group(unit) : QueryKey::GROUPS + value.group(unit - n);
        qkv[group * TILE_ROWS + row] =
            sum_supers<HIDDEN_SUPERS>(part + unit * HIDDEN_SUPERS * TILE_ROWS + row);
    }
}

// The output product of attention, and the residual, in place. Attention comes as its tiles' results
// when there are few (`tiles` not null: decode_attention.cu), merged here by every block for itself.
struct AttnOut {
    const uint8* w;
    static constexpr int GROUPS = HIDDEN / TILE_ROWS;
    DEV const uint8* tile(int j) const {
        int group = blockIdx.x + j / HEADS_SUPERS * gridDim.x;
        return w + (int64(group) * HEADS_SUPERS + j % HEADS_SUPERS) * OUT_WEIGHT::TILE_BYTES;
    }
    DEV int act(int j) const { return j % HEADS_SUPERS; }
};
struct AttnOutShared {
    Act x[HEADS_SUPERS];
    __align__(16) uint8 tail[16];
};
KERNEL(THREADS) decode_attn_out(const float* attention, const Step* step, const float2* max_and_sum,
                                const float* tiles, int most_tiles, const uint8* w, float* x) {
    DYNAMIC_SHARED(AttnOutShared, sh);
    AttnOut out = {w};
    int n = dealt(AttnOut::GROUPS);
    using Tiles = Products<OUT_WEIGHT, AttnOut, DEPTH_OUT>;
    Tiles products(out, sh->tail, n * HEADS_SUPERS, warp_id());
    float* part = reinterpret_cast<float*>(sh->tail + Tiles::slot_bytes(n * HEADS_SUPERS));
    let_next_start();
    wait_for_previous();
    if (tiles) {
        TileResults results = {max_and_sum, tiles, most_tiles, step->position / TILE + 1};
#pragma unroll
        for (int s = warp_id(); s < HEADS_SUPERS; s += WARPS) {
            float v[8];
            results.merged(s * SUPER + 8 * lane_id(), v);
            quantise_superblock(v, sh->x + s);
        }
    } else {
        quantise_supers(attention, HEADS_SUPERS, sh->x);
    }
    __syncthreads();
    products.run(sh->x, part);
    __syncthreads();
    for (int i = threadIdx.x; i < n * TILE_ROWS; i += THREADS) {
        int unit = i / TILE_ROWS, row = i % TILE_ROWS;
        int at = (blockIdx.x + unit * gridDim.x) * TILE_ROWS + row;
        float y = sum_supers<HEADS_SUPERS>(part + unit * HEADS_SUPERS * TILE_ROWS + row);
        x[at] = add(x[at], y);
    }
}

// Norm; logits of the router, an expert a block; the quantised activations, a superblock a block.
KERNEL(THREADS) decode_router(const float* x, const float* norm, float eps, const uint8* w,
                              float* logits, Act* acts) {
    __shared__ __align__(16) float normed[HIDDEN];
    __shared__ float buffer[2][SUPER];
    float weight[HIDDEN_SUPERS], row[HIDDEN_SUPERS] = {};
    int expert = blockIdx.x;
    fetch_norm(norm, weight);
    if (expert < EXPERTS)
#pragma unroll
        for (int i = 0; i < HIDDEN_SUPERS; i++)
            row[i] = load_float(w, int64(expert) * HIDDEN + i * SUPER + threadIdx.x, ROUTER_KIND);
    let_next_start();
    wait_for_previous();
    norm_to_shared(x, weight, eps, normed, buffer[0]);
    if (warp_id() == 0)
        for (int s = blockIdx.x; s < HIDDEN_SUPERS; s += gridDim.x) {
            float v[8];
            for (int i = 0; i < 8; i++) v[i] = normed[s * SUPER + 8 * lane_id() + i];
            quantise_superblock(v, acts + s);
        }
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < HIDDEN_SUPERS; i++)
        sum = add(sum, mul(row[i], normed[i * SUPER + threadIdx.x]));
    float z = block_tree(sum, buffer[1]);
    if (threadIdx.x == 0 && expert < EXPERTS) logits[expert] = z;
}

// The chosen experts (section 7), computed by every block for itself: probabilities by every warp,
// then ranks by counting. An expert's rank is the number of those before it.
struct Choice {
    int id[USED];
    float weight[USED];
};
struct ChoiceShared {
    float p[WARPS][EXPERTS + 1];
    float chosen[USED];
};
DEV void choose(const float* logits, int normalise, ChoiceShared* sh, Choice* choice) {
    constexpr int EACH = (EXPERTS + WARP - 1) / WARP;
    const float lowest = isobit::from_bits(0xff800000u);
    float z[EACH], m = lowest, lanes[8] = {};
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        int e = i * WARP + lane_id();
        z[i] = e < EXPERTS ? logits[e] : lowest;
    }
    if (threadIdx.x < USED) choice->id[threadIdx.x] = 0, sh->chosen[threadIdx.x] = 0.0f;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < EACH; i++) m = fmaxf(m, z[i]);
    m = warp_max(m);
#pragma unroll
    for (int i = 0; i < EACH; i++) {  // lane l + 32 (i % 8) of sum256
        z[i] = i * WARP + lane_id() < EXPERTS ? isobit::exp(sub(z[i], m)) : 0.0f;
        lanes[i % 8] = add(lanes[i % 8], z[i]);
    }
    for (int n = 4; n; n /= 2)
        for (int i = 0; i < n; i++) lanes[i] = add(lanes[i], lanes[i + n]);
    float total = warp_tree(lanes[0]);
    float* p = sh->p[warp_id()];
#pragma unroll
    for (int i = 0; i < EACH; i++)
        if (i * WARP + lane_id() < EXPERTS) p[i * WARP + lane_id()] = div(z[i], total);
    __syncwarp();
    // Two lanes count for one expert; a warp takes 16 experts at a time.
    for (int base = warp_id() * 16; base < EXPERTS; base += WARPS * 16) {
        int e = base + lane_id() / 2, before = 0;
        float mine = e < EXPERTS ? p[e] : 0.0f;
        // Those before e come first at an equal probability, those behind it only at a larger one.
        uint32 least = bits(mine), larger = least + 1;
#pragma unroll 16
        for (int j = lane_id() % 2; j < EXPERTS; j += 2) before += bits(p[j]) >= (j < e ? least : larger);
        before += shuffle_xor(before, 1);
        if (e < EXPERTS && before < USED) {
            choice->id[before] = e;
            sh->chosen[before] = mine;
        }
    }
    __syncthreads();
    if (threadIdx.x < USED) {
        float all = 0.0f;
#pragma unroll
        for (int r = 0; r < USED; r++) all = add(all, sh->chosen[r]);
        float w = sh->chosen[threadIdx.x];
        choice->weight[threadIdx.x] = normalise ? div(w, all) : w;
    }
}

// The tiles of W_down for the chosen experts: a unit is the same 8 rows of each.
struct Down {
    const uint8* w;
    const int* id;
    static constexpr int GROUPS = HIDDEN / TILE_ROWS, PER_UNIT = USED * FFN_SUPERS;
    static constexpr int64 MATRIX = int64(GROUPS) * FFN_SUPERS * DOWN_WEIGHT::TILE_BYTES;
    DEV const uint8* tile(int j) const {
        int group = blockIdx.x + j / PER_UNIT * gridDim.x;
        return w + id[j / FFN_SUPERS % USED] * MATRIX +
               (int64(group) * FFN_SUPERS + j % FFN_SUPERS) * DOWN_WEIGHT::TILE_BYTES;
    }
    DEV int act(int j) const { return j % PER_UNIT; }
};
// Have this block's tiles of W_down on their way while it computes gate and up.
DEV void prefetch_down(const uint8* w, const int* id) {
    Down down = {w, id};
    constexpr int LINE = 128, RUN = FFN_SUPERS * DOWN_WEIGHT::TILE_BYTES, LINES = (RUN + LINE - 1) / LINE;
    int runs = dealt(Down::GROUPS) * USED;
    for (int i = threadIdx.x; i < runs * LINES; i += THREADS)
        prefetch_line(down.tile(i / LINES * FFN_SUPERS) + i % LINES * LINE);
}

// W_gate h and W_up h of the chosen experts, and SwiGLU.
struct GateUp {
    const uint8 *gate, *up;
    const Choice* choice;
    static constexpr int GROUPS = FFN / TILE_ROWS;
    static constexpr int64 MATRIX = int64(GROUPS) * HIDDEN_SUPERS * GATE_WEIGHT::TILE_BYTES;
    // A unit is the same 8 rows of both matrices of one expert.
    DEV int unit(int j) const { return blockIdx.x + j / (2 * HIDDEN_SUPERS) * gridDim.x; }
    DEV const uint8* tile(int j) const {
        int u = unit(j), rank = u / GROUPS, group = u % GROUPS;
        const uint8* matrix = j / HIDDEN_SUPERS % 2 ? up : gate;
        return matrix + choice->id[rank] * MATRIX +
               (group * HIDDEN_SUPERS + j % HIDDEN_SUPERS) * GATE_WEIGHT::TILE_BYTES;
    }
    DEV int act(int j) const { return j % HIDDEN_SUPERS; }
};
struct GateUpShared {
    Act x[HIDDEN_SUPERS];
#if EXPERTS
    ChoiceShared choosing;
#else
    __align__(16) float normed[HIDDEN];
    float buffer[SUPER];
#endif
    Choice choice;
    __align__(16) uint8 tail[16];
};
KERNEL(THREADS) decode_gate_up(const Act* acts, const float* logits, int normalise, const float* x,
                               const float* norm, float eps, const uint8* gate, const uint8* up,
                               const uint8* down, int* ids, float* weights, float* y) {
    DYNAMIC_SHARED(GateUpShared, sh);
    GateUp where = {gate, up, &sh->choice};
    int n = dealt(USED * GateUp::GROUPS);
    using Tiles = Products<GATE_WEIGHT, GateUp, DEPTH_GATE>;
    float* all = reinterpret_cast<float*>(sh->tail + Tiles::slot_bytes(n * 2 * HIDDEN_SUPERS));
#if EXPERTS
    let_next_start();
    wait_for_previous();
    choose(logits, normalise, &sh->choosing, &sh->choice);
    Tiles products(where, sh->tail, n * 2 * HIDDEN_SUPERS, warp_id());
    copy_acts(acts, HIDDEN_SUPERS, sh->x);
    prefetch_down(down, sh->choice.id);
    if (blockIdx.x == 0 && threadIdx.x < USED) {
        ids[threadIdx.x] = sh->choice.id[threadIdx.x];
        weights[threadIdx.x] = sh->choice.weight[threadIdx.x];
    }
#else
    float weight[HIDDEN_SUPERS];
    if (threadIdx.x == 0) sh->choice.id[0] = 0;
    __syncthreads();
    Tiles products(where, sh->tail, n * 2 * HIDDEN_SUPERS, warp_id());
    fetch_norm(norm, weight);
    let_next_start();
    wait_for_previous();
    norm_to_shared(x, weight, eps, sh->normed, sh->buffer);
    quantise_supers(sh->normed, HIDDEN_SUPERS, sh->x);
#endif
    __syncthreads();
    products.run(sh->x, all);
    __syncthreads();
    for (int i = threadIdx.x; i < n * TILE_ROWS; i += THREADS) {
        int u = i / TILE_ROWS, row = i % TILE_ROWS;
        const float* part = all + u * 2 * HIDDEN_SUPERS * TILE_ROWS + row;
        float g = sum_supers<HIDDEN_SUPERS>(part);
        float up_value = sum_supers<HIDDEN_SUPERS>(part + HIDDEN_SUPERS * TILE_ROWS);
        y[(blockIdx.x + u * gridDim.x) * TILE_ROWS + row] = isobit::silu_gate(g, up_value);
    }
}

// W_down of the chosen experts, their weighted sum in rank order, and the residual, in place.
struct DownShared {
    Act x[USED * FFN_SUPERS];
    int id[USED];
    __align__(16) uint8 tail[16];
};
KERNEL(THREADS) decode_down(const float* y, const int* ids, const float* weights, const uint8* w,
                            float* x) {
    DYNAMIC_SHARED(DownShared, sh);
    Down where = {w, sh->id};
    int n = dealt(Down::GROUPS);
    let_next_start();
#if EXPERTS
    wait_for_previous();
    if (threadIdx.x < USED) sh->id[threadIdx.x] = ids[threadIdx.x];
#else
    if (threadIdx.x == 0) sh->id[0] = 0;
#endif
    __syncthreads();
    using Tiles = Products<DOWN_WEIGHT, Down, DEPTH_DOWN>;
    Tiles products(where, sh->tail, n * Down::PER_UNIT, warp_id());
    float* all = reinterpret_cast<float*>(sh->tail + Tiles::slot_bytes(n * Down::PER_UNIT));
#if !EXPERTS
    wait_for_previous();
#endif
    quantise_supers(y, USED * FFN_SUPERS, sh->x);
    __syncthreads();
    products.run(sh->x, all);
    __syncthreads();
    for (int i = threadIdx.x; i < n * TILE_ROWS; i += THREADS) {
        int unit = i / TILE_ROWS, row = i % TILE_ROWS;
        const float* part = all + unit * Down::PER_UNIT * TILE_ROWS + row;
        float sum = 0.0f;
#if EXPERTS
#pragma unroll
        for (int r = 0; r < USED; r++)
            sum = add(sum, mul(weights[r], sum_supers<FFN_SUPERS>(part + r * FFN_SUPERS * TILE_ROWS)));
#else
        sum = sum_supers<FFN_SUPERS>(part);
#endif
        int at = (blockIdx.x + unit * gridDim.x) * TILE_ROWS + row;
        x[at] = add(x[at], sum);
    }
}

// Final norm, output product, and the largest logit, the lower index among equals. The last block to
// end sets up the next step.
struct Output {
    const uint8* w;
    DEV const uint8* tile(int j) const {
        int group = blockIdx.x + j / HIDDEN_SUPERS * gridDim.x;
        return w + (int64(group) * HIDDEN_SUPERS + j % HIDDEN_SUPERS) * HEAD_WEIGHT::TILE_BYTES;
    }
    DEV int act(int j) const { return j % HIDDEN_SUPERS; }
};
struct OutputShared {
    Act x[HIDDEN_SUPERS];
    __align__(16) float normed[HIDDEN];
    float buffer[SUPER];
    unsigned long long best[WARPS];
    int last;
    __align__(16) uint8 tail[16];
};
// Orders floats as integers, -0 with +0; the index decides among equals.
DEV unsigned long long rank_key(float v, int index) {
    uint32 b = v == 0.0f ? 0u : bits(v);
    b = b >> 31 ? ~b : b | 0x80000000u;
    return (unsigned long long)(b) << 32 | (0xffffffffu - uint32(index));
}
DEV unsigned long long block_best(unsigned long long key, unsigned long long* buffer) {
    for (int n = 16; n; n /= 2) key = max(key, shuffle_xor(key, n));
    if (lane_id() == 0) buffer[warp_id()] = key;
    __syncthreads();
    for (int w = 0; w < WARPS; w++) key = max(key, buffer[w]);
    return key;
}
KERNEL(THREADS) decode_head(const float* x, const float* norm, float eps, const uint8* w, int rows,
                            float* logits, unsigned long long* best, Step* step, int* generated) {
    DYNAMIC_SHARED(OutputShared, sh);
    Output where = {w};
    int n = dealt(rows / TILE_ROWS);
    float weight[HIDDEN_SUPERS];
    using Tiles = Products<HEAD_WEIGHT, Output, DEPTH_HEAD>;
    Tiles products(where, sh->tail, n * HIDDEN_SUPERS, warp_id());
    float* part = reinterpret_cast<float*>(sh->tail + Tiles::slot_bytes(n * HIDDEN_SUPERS));
    fetch_norm(norm, weight);
    let_next_start();
    wait_for_previous();
    norm_to_shared(x, weight, eps, sh->normed, sh->buffer);
    quantise_supers(sh->normed, HIDDEN_SUPERS, sh->x);
    __syncthreads();
    products.run(sh->x, part);
    __syncthreads();
    unsigned long long key = 0;
    for (int i = threadIdx.x; i < n * TILE_ROWS; i += THREADS) {
        int at = (blockIdx.x + i / TILE_ROWS * gridDim.x) * TILE_ROWS + i % TILE_ROWS;
        float z = sum_supers<HIDDEN_SUPERS>(part + i / TILE_ROWS * HIDDEN_SUPERS * TILE_ROWS +
                                            i % TILE_ROWS);
        logits[at] = z;
        key = max(key, rank_key(z, at));
        if (magnitude(z) >= 0x7f800000u) step->not_finite = 1;
    }
    key = block_best(key, sh->best);
    if (threadIdx.x == 0) {
        best[blockIdx.x] = key;
        __threadfence();
        sh->last = atomicAdd(&step->done, 1) == int(gridDim.x) - 1;
    }
    __syncthreads();
    if (!sh->last) return;
    __threadfence();
    key = 0;
    for (int i = threadIdx.x; i < int(gridDim.x); i += THREADS) key = max(key, load_fresh(best + i));
    __syncthreads();
    key = block_best(key, sh->best);
    if (threadIdx.x == 0) {
        int token = int(0xffffffffu - uint32(key));
        generated[step->position] = token;
        step->token = token;
        step->position++;
        step->done = 0;
    }
}
