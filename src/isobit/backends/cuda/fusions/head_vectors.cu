// Norm, RoPE and quantisation of head vectors, and their store to the cache (docs/numerics.md, section
// 6). HEADS, KV_HEADS and HEAD_DIM are given by definition.
#include "cache.cuh"

constexpr int ALL = HEADS + 2 * KV_HEADS, HALF = HEAD_DIM / 2, PADDED = (HEAD_DIM + 15) / 16 * 16;
constexpr int PARTS = (HEAD_DIM + WARP - 1) / WARP;  // of a vector: lane l holds values l + 32 * part
static_assert(PARTS <= 16, "a lane of sum256 adds two parts at most; config.py: head_dim <= 512");

DEV bool there(int part) { return HEAD_DIM % WARP == 0 || lane_id() + WARP * part < HEAD_DIM; }

// y = y's norm.
DEV void norm(float (&y)[PARTS], const float (&weight)[PARTS], float eps) {
    float lanes[8] = {};
#pragma unroll
    for (int part = 0; part < PARTS; part++)
        lanes[part % 8] = add(lanes[part % 8], mul(y[part], y[part]));
    float mean = div(tree256(lanes), float(HEAD_DIM));
    float r = div(1.0f, square_root(add(mean, eps)));
#pragma unroll
    for (int part = 0; part < PARTS; part++) y[part] = mul(mul(y[part], r), weight[part]);
}

// y rotated; cosine and sine of the pair of each value. room: shared, of the warp, HEAD_DIM floats.
DEV void rotate(float (&y)[PARTS], const float (&c)[PARTS], const float (&s)[PARTS], float* room) {
    float other[PARTS];  // the other value of the pair
    if constexpr (HALF % WARP == 0) {
#pragma unroll
        for (int part = 0; part < PARTS; part++) other[part] = y[(part + PARTS / 2) % PARTS];
    } else {
#pragma unroll
        for (int part = 0; part < PARTS; part++)
            if (there(part)) room[lane_id() + WARP * part] = y[part];
        __syncwarp();
#pragma unroll
        for (int part = 0; part < PARTS; part++) {
            int i = lane_id() + WARP * part;
            if (there(part)) other[part] = room[i < HALF ? i + HALF : i - HALF];
        }
    }
#pragma unroll
    for (int part = 0; part < PARTS; part++) {
        float own = mul(y[part], c[part]), turn = mul(other[part], s[part]);
        y[part] = lane_id() + WARP * part < HALF ? sub(own, turn) : add(own, turn);
    }
}

// Head vectors, one a warp: those of a token are its q heads, then k, then v. Norm and RoPE for q and k,
// quantisation, and the store to q_int or the cache.
KERNEL(THREADS) head_vectors(const float* qkv, const float* q_norm, const float* k_norm, float eps,
                             const float* cos_table, const float* sin_table, const int* positions,
                             const int* sequence, const int* pages, int pages_per_sequence,
                             float scale, short* q_int, float* dq,
                             int8* k, int8* v, float* dk, float* dv, int tokens) {
    __shared__ float rooms[THREADS / WARP][HALF % WARP == 0 ? 1 : HEAD_DIM];
    let_next_start();
    wait_for_previous();
    Cache cache = {k, v, dk, dv, KV_HEADS, PADDED};
    int index = blockIdx.x * (THREADS / WARP) + warp_id(), token = index / ALL, head = index % ALL;
    if (token >= tokens) return;
    int position = positions[token], page = 0, slot = position % TILE;
    bool query = head < HEADS, value = head >= HEADS + KV_HEADS;
    const float* x = qkv + int64(index) * HEAD_DIM + lane_id();
    float y[PARTS];
#pragma unroll
    for (int part = 0; part < PARTS; part++) y[part] = there(part) ? x[WARP * part] : 0.0f;
    if (!query) page = pages[sequence[token] * pages_per_sequence + position / TILE];
    if (!value) {
        const float* weight = (query ? q_norm : k_norm) + lane_id();
        int64 turns = int64(position) * HALF;
        float w[PARTS], c[PARTS], s[PARTS];
#pragma unroll
        for (int part = 0; part < PARTS; part++) {
            int i = lane_id() + WARP * part, pair = i < HALF ? i : i - HALF;
            w[part] = there(part) ? weight[WARP * part] : 0.0f;
            c[part] = there(part) ? cos_table[turns + pair] : 0.0f;
            s[part] = there(part) ? sin_table[turns + pair] : 0.0f;
        }
        norm(y, w, eps);
        rotate(y, c, s, rooms[warp_id()]);
    }

    uint32 amax = 0;
#pragma unroll
    for (int part = 0; part < PARTS; part++) amax = max(amax, magnitude(there(part) ? y[part] : 0.0f));
    isobit::BlockScale block = isobit::block_scale(warp_max(amax), 2);
    int own = query ? head : (head - HEADS) % KV_HEADS;
    short* q_to = q_int + (int64(token) * HEADS + own) * PADDED;
    int8* k_to = cache.keys(page, own, 0) + slot * PADDED;
    int8* v_to = cache.values(page, own, 0) + value_slot(slot);
#pragma unroll
    for (int part = 0; part < PARTS; part++) {
        int i = lane_id() + WARP * part;
        if (i >= PADDED) continue;
        int q = there(part) ? quantised(y[part], block) : 0;
        int high = isobit::high_plane(q), low = isobit::low_plane(q);
        if (query) {
            q_to[i] = short(q);
        } else if (!value) {
            k_to[i] = int8(high);
            k_to[TILE * PADDED + i] = int8(low);
        } else {
            v_to[i * TILE] = int8(high);
            v_to[TILE * PADDED + i * TILE] = int8(low);
        }
    }
    if (lane_id() == 0) {
        int64 at = cache.scales(page, own) + slot;
        if (query) dq[token * HEADS + own] = mul(block.d, scale);
        else (value ? dv : dk)[at] = block.d;
    }
}
