// Attention of one token of each sequence (docs/numerics.md, section 6): head vectors and tiles in one
// kernel.
//
// With KIN, up to so many tokens that follow one another may be of one sequence. Nobody waits for the keys
// and values of those before it: each makes them for itself.
//
// ROTATED: values of a head vector that RoPE rotates, the first. Q_STEP: head vectors from one query to the next.
#include "key_tiles.cuh"

#ifndef ROTATED
#define ROTATED HEAD_DIM
#endif
#ifndef Q_STEP
#define Q_STEP 1
#endif
#ifndef PARTS  // of the product of q, k and v (part_matmul.cu), to be added up; or it lies as a whole
#define PARTS 1
#endif
constexpr int EACH = HEAD_DIM / WARP;  // values of a head vector in a lane: lane + 32 i
constexpr int PAIRS = ROTATED / 2 / WARP, VECTORS = Q_STEP * HEADS + 2 * KV_HEADS;

// Norm, RoPE (of q and k) and quantisation of one head vector by one warp.
struct HeadVector {
    float weight[EACH], cosine[PAIRS], sine[PAIRS];  // fetched ahead
    int q[EACH];
    float d;

    DEV void fetch(const float* norm, const float* cosines, const float* sines) {
#pragma unroll
        for (int i = 0; i < EACH; i++) weight[i] = norm[lane_id() + WARP * i];
#pragma unroll
        for (int i = 0; i < PAIRS; i++) {
            cosine[i] = cosines[lane_id() + WARP * i];
            sine[i] = sines[lane_id() + WARP * i];
        }
    }
    // x: from the lane's first value on.
    DEV void of(const float* x, int64 part, bool rotated) {
        float v[EACH];
        if (PARTS == 1) {
#pragma unroll
            for (int i = 0; i < EACH; i++) v[i] = x[WARP * i];
        } else {
            float y[PARTS][EACH];
#pragma unroll
            for (int s = 0; s < PARTS; s++)
#pragma unroll
                for (int i = 0; i < EACH; i++) y[s][i] = x[s * part + WARP * i];
#pragma unroll
            for (int i = 0; i < EACH; i++) {
                v[i] = 0.0f;
#pragma unroll
                for (int s = 0; s < PARTS; s++) v[i] = add(v[i], y[s][i]);
            }
        }
        if (rotated) rope(v);
        uint32 amax = 0;
#pragma unroll
        for (int i = 0; i < EACH; i++) amax = max(amax, magnitude(v[i]));
        isobit::BlockScale scale = isobit::block_scale(warp_max(amax), 2);
#pragma unroll
        for (int i = 0; i < EACH; i++) q[i] = quantised(v[i], scale);
        d = scale.d;
    }
    float eps;
    DEV void rope(float (&v)[EACH]) {
        float sum[8] = {};  // 256 lanes of sum256: lane + 32 i
#pragma unroll
        for (int i = 0; i < EACH; i++) sum[i % 8] = add(sum[i % 8], mul(v[i], v[i]));
        for (int n = 4; n; n /= 2)
            for (int i = 0; i < n; i++) sum[i] = add(sum[i], sum[i + n]);
        float mean = mean_of<HEAD_DIM>(warp_tree(sum[0]));
        float r = div(1.0f, square_root(add(mean, eps)));
#pragma unroll
        for (int i = 0; i < EACH; i++) v[i] = mul(mul(v[i], r), weight[i]);
#pragma unroll
        for (int i = 0; i < PAIRS; i++) {
            float a = v[i], b = v[i + PAIRS];
            v[i] = sub(mul(a, cosine[i]), mul(b, sine[i]));
            v[i + PAIRS] = add(mul(b, cosine[i]), mul(a, sine[i]));
        }
    }
};

// Blocks: x tiles (dealt), y key-value head, z token. of: the number of each token's sequence, read if
// there is KIN. Results: attend() of key_tiles.cuh.
KERNEL(320) decode_attention(const float* qkv, const float* q_norm, const float* k_norm, float eps,
                             const float* cosines, const float* sines, const int* positions,
                             const int* pages, float scale, int8* k, int8* v, float* dk, float* dv,
                             int most_tiles, const int* of, float2* max_and_sum, float* out,
                             ActivationBlock* acts) {
    mark(6, 0);
    DYNAMIC_SHARED(AttentionShared, sh);
    Cache cache = {k, v, dk, dv, KV_HEADS, HEAD_DIM};
    int head = blockIdx.y, sequence = blockIdx.z, position = positions[sequence];
    int tiles = position / KV_PAGE + 1, t = blockIdx.x;
    if (t >= tiles) return;
    pages += sequence * most_tiles;
    Fetches fetches = {sh, cache, head};
    fetches.prepare();
    auto fetch = [&](int n, int which) {  // k or v of tile n of this block's, if it has one
        int at = blockIdx.x + n * gridDim.x;
        if (at < tiles) fetches.fetch(n, pages[at], which);
        else fetches.none();
    };
    fetch(0, 0), fetch(0, 1);  // more would make this step's few bytes wait behind tiles
    // Warps share the head vectors: the group's of q, then the one of k, then that of v.
    int kin = 1;  // tokens of this sequence up to this one
#if KIN > 1
    while (kin <= sequence && of[sequence - kin] == of[sequence]) kin++;
#endif
    const int vectors = GROUP + 2 * kin;
    constexpr int VECTOR_WARPS = ATTENTION_THREADS / WARP;
    struct Turn {
        int back;  // its token is so many before this one
        bool is_q, is_k;
        const float* from;  // of a lane; null if another block has its tile
    };
    auto turn = [&](int i) -> Turn {
        Turn of;
        of.is_q = i < GROUP;
        of.back = KIN == 1 || of.is_q ? 0 : (i - GROUP) / 2;
        of.is_k = KIN == 1 ? i == GROUP : !of.is_q && (i - GROUP) % 2 == 0;
        int tile = KIN == 1 ? tiles - 1 : (position - of.back) / KV_PAGE;
        bool here = of.is_q || uint32(tile) % gridDim.x == blockIdx.x;
        int vector = of.is_q ? Q_STEP * (head * GROUP + i) : Q_STEP * HEADS + (of.is_k ? 0 : KV_HEADS) + head;
        of.from = here ? qkv + (int64(sequence - of.back) * VECTORS + vector) * HEAD_DIM + lane_id() : nullptr;
        return of;
    };
    HeadVector x;
    x.eps = eps;
    Turn own = turn(warp_id());
    auto fetch_turn = [&] {
        int at = (position - own.back) * (ROTATED / 2);
        x.fetch(own.is_q ? q_norm : k_norm, cosines + at, sines + at);
    };
    if (KIN == 1 || warp_id() < vectors) fetch_turn();
    own.from = at_hand(own.from);
    const int own_page = pages[tiles - 1];  // of this token; it is on its way before x is there
    let_next_start();
    for (int i = threadIdx.x; i < int(sizeof sh->q) / 4; i += ATTENTION_THREADS)
        reinterpret_cast<int*>(sh->q)[i] = 0;  // heads that are not there stay so
    __syncthreads();
    wait_for_previous();
    mark(6, 1);
#pragma unroll 1
    for (int i = warp_id(); i < vectors; i += VECTOR_WARPS) {
        if (i >= VECTOR_WARPS) own = turn(i);
        if (!own.from) {
            if (KIN == 1) break;
            continue;
        }
        if (i >= VECTOR_WARPS) fetch_turn();
        bool is_q = own.is_q, is_k = own.is_k;
        int b = own.back, at = position - b;
        x.of(own.from, int64(gridDim.z) * VECTORS * HEAD_DIM, is_q || is_k);
        int slot = at % KV_PAGE;
#pragma unroll
        for (int n = 0; n < EACH; n++) {
            int c = lane_id() + WARP * n;
            int8 plane[2] = {int8(isobit::high_plane(x.q[n])), int8(isobit::low_plane(x.q[n]))};
#pragma unroll
            for (int p = 0; p < 2; p++)
                if (is_q) {
                    sh->q[p][i][c] = plane[p];
                } else if (is_k) {
                    sh->k[b][p][c] = plane[p];
                    if (b == 0) cache.keys(own_page, head, p)[slot * HEAD_DIM + c] = plane[p];
                } else {
                    sh->v[b][p][c] = plane[p];
                    if (b == 0) cache.values(own_page, head, p)[c * KV_PAGE + value_slot(slot)] = plane[p];
                }
        }
        if (lane_id() == 0) {
            if (is_q) sh->dq[i] = mul(x.d, scale);
            else (is_k ? sh->dk : sh->dv)[b] = x.d;
            if (!is_q && b == 0) (is_k ? dk : dv)[cache.scales(own_page, head) + slot] = x.d;
        }
    }
    for (int n = 1; n < BUFFERS; n++) fetch(n, 0), fetch(n, 1);
    __syncthreads();
    mark(6, 2);
    // Tokens of this step, which a tile may have been fetched without.
    auto lacks = [&](int t) { return t >= (KIN == 1 ? tiles - 1 : (position - kin + 1) / KV_PAGE); };
    auto patch = [&](int t, TileBytes& tile) {
#pragma unroll 1
        for (int b = 0; b < kin; b++) {
            int slot = position - b - t * KV_PAGE;
            if (KIN > 1 && (slot < 0 || slot >= KV_PAGE)) continue;
            for (int c = threadIdx.x; c < 2 * HEAD_DIM; c += ATTENTION_THREADS) {
                tile.k[c / HEAD_DIM][slot][c % HEAD_DIM] = (&sh->k[b][0][0])[c];
                tile.v[c / HEAD_DIM][c % HEAD_DIM][value_slot(slot)] = (&sh->v[b][0][0])[c];
            }
            if (threadIdx.x == 0) tile.dk[slot] = sh->dk[b], tile.dv[slot] = sh->dv[b];
        }
        __syncthreads();
    };
    attend(fetches, sequence, position, tiles, fetch, lacks, patch, most_tiles, max_and_sum, out, acts);
    mark(6, 3);
}
