// Norm, RoPE and quantisation of head vectors, and their store to the cache (docs/numerics.md, section
// 6). HEADS, KV_HEADS and HEAD_DIM are given by definition; ROTATED: values that RoPE rotates, the first; Q_STEP:
// vectors from one query to the next.
#include "cache.cuh"

#ifndef ROTATED
#define ROTATED HEAD_DIM
#endif
#ifndef Q_STEP
#define Q_STEP 1
#endif
constexpr int ALL = HEADS + 2 * KV_HEADS, WIDTH = (Q_STEP * HEADS + 2 * KV_HEADS) * HEAD_DIM;
constexpr int HALF = ROTATED / 2, PADDED = (HEAD_DIM + 15) / 16 * 16;
constexpr int PARTS = (HEAD_DIM + WARP - 1) / WARP;  // of a vector: lane l holds values l + 32 * part
static_assert(PARTS <= 16, "a lane of sum256 adds two parts at most; config.py: head_dim <= 512");

DEV bool there(int part) { return HEAD_DIM % WARP == 0 || lane_id() + WARP * part < HEAD_DIM; }

// y = y's norm.
DEV void norm(float (&y)[PARTS], const float (&weight)[PARTS], float eps) {
    float lanes[8] = {};
#pragma unroll
    for (int part = 0; part < PARTS; part++)
        lanes[part % 8] = add(lanes[part % 8], mul(y[part], y[part]));
    float mean = mean_of<HEAD_DIM>(tree256(lanes));
    float r = div(1.0f, square_root(add(mean, eps)));
#pragma unroll
    for (int part = 0; part < PARTS; part++) y[part] = mul(mul(y[part], r), weight[part]);
}

// y rotated; cosine and sine of the pair of each value. scratch: shared, of the warp, HEAD_DIM floats.
DEV void rotate(float (&y)[PARTS], const float (&c)[PARTS], const float (&s)[PARTS], float* scratch) {
    constexpr int PAIRED = ROTATED / WARP;
    float other[PARTS];  // the other value of the pair
    if constexpr (HALF % WARP == 0) {
#pragma unroll
        for (int part = 0; part < PAIRED; part++) other[part] = y[(part + PAIRED / 2) % PAIRED];
    } else {
#pragma unroll
        for (int part = 0; part < PARTS; part++)
            if (there(part)) scratch[lane_id() + WARP * part] = y[part];
        __syncwarp();
#pragma unroll
        for (int part = 0; part < PARTS; part++) {
            int i = lane_id() + WARP * part;
            if (there(part) && i < ROTATED) other[part] = scratch[i < HALF ? i + HALF : i - HALF];
        }
    }
#pragma unroll
    for (int part = 0; part < PARTS; part++) {
        if (lane_id() + WARP * part >= ROTATED) break;
        float own = mul(y[part], c[part]), rotated = mul(other[part], s[part]);
        y[part] = lane_id() + WARP * part < HALF ? sub(own, rotated) : add(own, rotated);
    }
}

// The integers of a vector, 0 past its end; its scale.
DEV float integers(const float (&y)[PARTS], int (&q)[PARTS]) {
    uint32 amax = 0;
#pragma unroll
    for (int part = 0; part < PARTS; part++)
        amax = max(amax, there(part) ? magnitude(y[part]) : 0u);
    isobit::BlockScale block = isobit::block_scale(warp_max(amax), 2);
#pragma unroll
    for (int part = 0; part < PARTS; part++) q[part] = there(part) ? quantised(y[part], block) : 0;
    return block.d;
}

DEV void load(const float* x, float (&y)[PARTS]) {
#pragma unroll
    for (int part = 0; part < PARTS; part++) y[part] = there(part) ? x[WARP * part] : 0.0f;
}

// A value vector to its slot; or, of sixteen positions from a multiple of 16 that all are in the batch,
// the four whose bytes lie in a row (value_slot), by the warp of the first of them.
DEV void store_value(const float* x, int token, int tokens, int position, const int* positions,
                     const int* sequence, int8* to, float* dv) {
    int first = token - position % 16, last = first + 15;
    bool together = first >= 0 && last < tokens && positions[first] == (position & ~15) &&
                    positions[last] == (position | 15) && sequence[first] == sequence[last];
    if (together && position & 9) return;
    float y[4][PARTS], d[4];
    uint32 high[PARTS] = {}, low[PARTS] = {};
#pragma unroll
    for (int j = 0; j < 4; j++)
        if (j == 0 || together) load(x + (j % 2 + 8 * (j / 2)) * WIDTH, y[j]);
#pragma unroll
    for (int j = 0; j < 4; j++) {
        if (j && !together) break;
        int q[PARTS];
        d[j] = integers(y[j], q);
        if (lane_id() == 0) dv[j % 2 + 8 * (j / 2)] = d[j];
#pragma unroll
        for (int part = 0; part < PARTS; part++) {
            high[part] |= (isobit::high_plane(q[part]) & 255) << 8 * j;
            low[part] |= (isobit::low_plane(q[part]) & 255) << 8 * j;
        }
    }
#pragma unroll
    for (int part = 0; part < PARTS; part++) {
        int i = lane_id() + WARP * part;
        if (i >= PADDED) continue;
        int8 *high_to = to + i * KV_PAGE, *low_to = high_to + KV_PAGE * PADDED;
        if (together) {
            *reinterpret_cast<uint32*>(high_to) = high[part];
            *reinterpret_cast<uint32*>(low_to) = low[part];
        } else {
            *high_to = int8(high[part]);
            *low_to = int8(low[part]);
        }
    }
}

// Head vectors, one a warp: those of a token are its q heads, then k, then v. Norm and RoPE for q and k,
// quantisation, and the store to q_int or the cache.
KERNEL(THREADS) head_vectors(const float* qkv, const float* q_norm, const float* k_norm, float eps,
                             const float* cos_table, const float* sin_table, const int* positions,
                             const int* sequence, const int* pages, int pages_per_sequence,
                             float scale, short* q_int, float* dq,
                             int8* k, int8* v, float* dk, float* dv, int tokens) {
    __shared__ float scratch[THREADS / WARP][HALF % WARP == 0 ? 1 : HEAD_DIM];
    let_next_start();
    wait_for_previous();
    Cache cache = {k, v, dk, dv, KV_HEADS, PADDED};
    int index = blockIdx.x * (THREADS / WARP) + warp_id(), token = index / ALL, head = index % ALL;
    if (token >= tokens) return;
    int position = positions[token], page = 0, slot = position % KV_PAGE;
    bool query = head < HEADS;
    int own = query ? head : (head - HEADS) % KV_HEADS;
    int vector = query ? Q_STEP * head : Q_STEP * HEADS + head - HEADS;
    const float* x = qkv + int64(token) * WIDTH + vector * HEAD_DIM + lane_id();
    if (!query) page = pages[sequence[token] * pages_per_sequence + position / KV_PAGE];
    int64 scales = cache.scales(page, own) + slot;
    if (head >= HEADS + KV_HEADS) {
        int8* to = cache.values(page, own, 0) + value_slot(slot);
        store_value(x, token, tokens, position, positions, sequence, to, dv + scales);
        return;
    }
    const float* weight = (query ? q_norm : k_norm) + lane_id();
    int64 table_row = int64(position) * HALF;
    float y[PARTS], w[PARTS], c[PARTS], s[PARTS];
    load(x, y);
    load(weight, w);
#pragma unroll
    for (int part = 0; part < PARTS; part++) {
        int i = lane_id() + WARP * part, pair = i < HALF ? i : i - HALF;
        bool rotated = there(part) && i < ROTATED;
        c[part] = rotated ? cos_table[table_row + pair] : 0.0f;
        s[part] = rotated ? sin_table[table_row + pair] : 0.0f;
    }
    norm(y, w, eps);
    rotate(y, c, s, scratch[warp_id()]);
    int q[PARTS];
    float d = integers(y, q);
    short* q_to = q_int + (int64(token) * HEADS + own) * PADDED;
    int8* k_to = cache.keys(page, own, 0) + slot * PADDED;
#pragma unroll
    for (int part = 0; part < PARTS; part++) {
        int i = lane_id() + WARP * part;
        if (i >= PADDED) continue;
        if (query) {
            q_to[i] = short(q[part]);
        } else {
            k_to[i] = int8(isobit::high_plane(q[part]));
            k_to[KV_PAGE * PADDED + i] = int8(isobit::low_plane(q[part]));
        }
    }
    if (lane_id() == 0) {
        if (query) dq[token * HEADS + own] = mul(d, scale);
        else dk[scales] = d;
    }
}
