// Norm, RoPE and quantisation of head vectors, and their store to the cache (docs/numerics.md, section
// 6). HEAD_ROOM: places for the values of a head vector, a multiple of 32.
#include "cache.cuh"

// Head vectors, one a warp: those of a token are its q heads, then k, then v. Norm and RoPE for q and k,
// quantisation, and the store to q_int or the cache.
KERNEL(THREADS) head_vectors(int head_dim, const float* qkv, const float* q_norm,
                             const float* k_norm, float eps, const float* cos_table,
                             const float* sin_table, const int* positions, const int* sequence,
                             const int* pages, int pages_per_sequence, int n_heads, float scale,
                             short* q_int, float* dq,
                             int8* k, int8* v, float* dk, float* dv, int kv_heads, int padded,
                             int count) {
    begin();
    constexpr int PARTS = HEAD_ROOM / WARP;  // of a vector that a lane holds: values lane + 32 * part
    static_assert(PARTS <= 16, "a lane of sum256 adds two parts at most; config.py: head_dim <= 512");
    __shared__ float vectors[THREADS / WARP][HEAD_ROOM];
    Cache cache = {k, v, dk, dv, kv_heads, padded};
    int index = blockIdx.x * (THREADS / WARP) + warp_id(), heads = n_heads + 2 * kv_heads;
    if (index >= count) return;
    int token = index / heads, head = index % heads, kind = 0;  // kind: 0 q, 1 k, 2 v
    const float* x = qkv + int64(index) * head_dim;
    float* normed = vectors[warp_id()];
    if (head >= n_heads) {
        kind = 1 + (head - n_heads) / kv_heads;
        head = (head - n_heads) % kv_heads;
    }
    int position = positions[token], half = head_dim / 2;

    float y[PARTS];
#pragma unroll
    for (int part = 0; part < PARTS; part++) {
        int i = lane_id() + WARP * part;
        y[part] = i < head_dim ? x[i] : 0.0f;
    }
    if (kind < 2) {
        const float* weight = kind == 0 ? q_norm : k_norm;
        float lanes[8];  // of sum256: this lane's, 32 apart
#pragma unroll
        for (int j = 0; j < 8; j++) {
            lanes[j] = j < PARTS ? mul(y[j], y[j]) : 0.0f;
            if (j + 8 < PARTS) lanes[j] = add(lanes[j], mul(y[j + 8], y[j + 8]));
        }
        float even = add(add(lanes[0], lanes[4]), add(lanes[2], lanes[6]));
        float odd = add(add(lanes[1], lanes[5]), add(lanes[3], lanes[7]));
        float mean = div(warp_tree(add(even, odd)), float(head_dim));
        float r = div(1.0f, square_root(add(mean, eps)));
#pragma unroll
        for (int part = 0; part < PARTS; part++) {
            int i = lane_id() + WARP * part;
            if (i < head_dim) normed[i] = mul(mul(y[part], r), weight[i]);
        }
        __syncwarp();
#pragma unroll
        for (int part = 0; part < PARTS; part++) {
            int i = lane_id() + WARP * part;
            if (i >= head_dim) continue;
            int pair = i < half ? i : i - half;
            float c = cos_table[int64(position) * half + pair];
            float s = sin_table[int64(position) * half + pair];
            y[part] = i < half ? sub(mul(normed[i], c), mul(normed[i + half], s))
                               : add(mul(normed[i], c), mul(normed[pair], s));
        }
    }

    uint32 amax = 0;
#pragma unroll
    for (int part = 0; part < PARTS; part++) amax = max(amax, magnitude(y[part]));
    isobit::BlockScale block = isobit::block_scale(warp_max(amax), 2);
    int page = pages[sequence[token] * pages_per_sequence + position / TILE], slot = position % TILE;
#pragma unroll
    for (int part = 0; part < PARTS; part++) {
        int i = lane_id() + WARP * part;
        if (i >= padded) continue;
        int q = quantised(y[part], block);  // 0 past head_dim
        int high = isobit::high_plane(q), low = isobit::low_plane(q);
        if (kind == 0) {
            q_int[(int64(token) * n_heads + head) * padded + i] = short(q);
        } else if (kind == 1) {
            cache.keys(page, head, 0)[slot * padded + i] = int8(high);
            cache.keys(page, head, 1)[slot * padded + i] = int8(low);
        } else {
            cache.values(page, head, 0)[i * TILE + value_slot(slot)] = int8(high);
            cache.values(page, head, 1)[i * TILE + value_slot(slot)] = int8(low);
        }
    }
    if (lane_id() == 0) {
        if (kind == 0) dq[token * n_heads + head] = mul(block.d, scale);
        if (kind == 1) cache.dk[cache.scales(page, head) + slot] = block.d;
        if (kind == 2) cache.dv[cache.scales(page, head) + slot] = block.d;
    }
}
