// Attention of one token (docs/numerics.md, section 6): head vectors, tiles and their merge in one
// kernel. Integer products are tensor-core products of 8-bit planes, so they need HEAD_DIM % 64 == 0.
#include "cache.cuh"
#include "decode.cuh"
#include "mma.cuh"

constexpr int GROUP = HEADS / KV_HEADS;         // query heads of one key-value head
constexpr int BLOCKS_OF_8 = (GROUP + 7) / 8;    // products have 8 columns: query heads
constexpr int EACH = HEAD_DIM / WARP;           // values of a head vector in a lane: lane + 32 i
constexpr int ATTENTION_THREADS = 320;          // eight warps for q, one for k, one for v

struct AttentionShared {
    int8 q[2][8 * BLOCKS_OF_8][HEAD_DIM];  // planes
    float dq[8 * BLOCKS_OF_8];
    int dot[2][8 * BLOCKS_OF_8][TILE];     // with the planes of k
    int8 p[2][8 * BLOCKS_OF_8][TILE];
    float g[8 * BLOCKS_OF_8];
    int last;
};

// Norm (if weight), RoPE and quantisation of one head vector by one warp.
struct HeadVector {
    int q[EACH];
    float d;

    DEV void of(const float* x, const float* weight, float eps, const float* cosine,
                const float* sine) {
        float v[EACH];
#pragma unroll
        for (int i = 0; i < EACH; i++) v[i] = x[lane_id() + WARP * i];
        if (weight) {
            float sum[8] = {}, r;  // 256 lanes of sum256: lane + 32 i
#pragma unroll
            for (int i = 0; i < EACH; i++) sum[i % 8] = add(sum[i % 8], mul(v[i], v[i]));
            for (int n = 4; n; n /= 2)
                for (int i = 0; i < n; i++) sum[i] = add(sum[i], sum[i + n]);
            r = div(warp_tree(sum[0]), float(HEAD_DIM));
            r = div(1.0f, square_root(add(r, eps)));
#pragma unroll
            for (int i = 0; i < EACH; i++) v[i] = mul(mul(v[i], r), weight[lane_id() + WARP * i]);
#pragma unroll
            for (int i = 0; i < EACH / 2; i++) {
                float c = cosine[lane_id() + WARP * i], s = sine[lane_id() + WARP * i];
                float a = v[i], b = v[i + EACH / 2];
                v[i] = sub(mul(a, c), mul(b, s));
                v[i + EACH / 2] = add(mul(b, c), mul(a, s));
            }
        }
        uint32 amax = 0;
#pragma unroll
        for (int i = 0; i < EACH; i++) amax = max(amax, magnitude(v[i]));
        isobit::BlockScale scale = isobit::block_scale(warp_max(amax), 2);
#pragma unroll
        for (int i = 0; i < EACH; i++) q[i] = quantised(v[i], scale);
        d = scale.d;
    }
};

// Sixteen bytes of each operand, as two products of depth 32: lane 4r + i holds bytes 16i … 16i+15 of
// row r (and r + 8 in a[1]), and of column r of b.
DEV void products_64(int (&c)[4], const int4 (&a)[2], int4 b) {
    product32(c, {a[0].x, a[1].x, a[0].y, a[1].y}, b.x, b.y);
    product32(c, {a[0].z, a[1].z, a[0].w, a[1].w}, b.z, b.w);
}

// Scores of the tile's 64 keys: warp w takes keys 16(w%4) … +15 and plane w/4 of k.
DEV void key_products(const Cache& cache, int page, int head, AttentionShared* sh) {
    int block = warp_id() % 4, plane = warp_id() / 4, r = lane_id() / 4, i = lane_id() % 4;
    const int8* k = cache.keys(page, head, plane) + (16 * block + r) * HEAD_DIM + 16 * i;
    for (int n = 0; n < BLOCKS_OF_8; n++) {
        int sum[2][4] = {};
#pragma unroll
        for (int chunk = 0; chunk < HEAD_DIM / 64; chunk++) {
            int4 a[2] = {*reinterpret_cast<const int4*>(k + 64 * chunk),
                         *reinterpret_cast<const int4*>(k + 8 * HEAD_DIM + 64 * chunk)};
#pragma unroll
            for (int p = 0; p < 2; p++)
                products_64(sum[p], a,
                            *reinterpret_cast<const int4*>(&sh->q[p][8 * n + r][64 * chunk + 16 * i]));
        }
#pragma unroll
        for (int c = 0; c < 4; c++)  // row r or r + 8, columns 2i and 2i + 1
            sh->dot[plane][8 * n + 2 * i + c % 2][16 * block + r + c / 2 * 8] =
                256 * sum[0][c] + sum[1][c];
    }
}

// One head's weights of the tile by one warp: (m_t, l_t), P and g.
DEV void weigh(int head, int seen, const float* dk, const float* dv, AttentionShared* sh,
               float2* max_and_sum) {
    float s[2], p[2], weighted[2], m = isobit::from_bits(0xff800000u);
#pragma unroll
    for (int i = 0; i < 2; i++) {
        int j = lane_id() + WARP * i;
        float dot = add(mul(float(sh->dot[0][head][j]), 256.0f), float(sh->dot[1][head][j]));
        s[i] = j < seen ? mul(mul(sh->dq[head], dk[j]), dot) : m;
    }
    m = warp_max(fmaxf(s[0], s[1]));
    uint32 amax = 0;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        int j = lane_id() + WARP * i;
        p[i] = j < seen ? isobit::exp(sub(s[i], m)) : 0.0f;
        weighted[i] = j < seen ? mul(p[i], dv[j]) : 0.0f;
        amax = max(amax, magnitude(weighted[i]));
    }
    isobit::BlockScale scale = isobit::block_scale(warp_max(amax), 2);
#pragma unroll
    for (int i = 0; i < 2; i++) {
        int q = quantised(weighted[i], scale), j = lane_id() + WARP * i;
        sh->p[0][head][value_slot(j)] = int8(isobit::high_plane(q));
        sh->p[1][head][value_slot(j)] = int8(isobit::low_plane(q));
    }
    float l = warp_tree(add(p[0], p[1]));
    if (lane_id() == 0) {
        sh->g[head] = scale.d;
        *max_and_sum = make_float2(m, l);
    }
}

// The tile's outputs: warp w takes columns 16w … 16w+15. out: [GROUP][HEAD_DIM].
DEV void value_products(const Cache& cache, int page, int head, const AttentionShared* sh,
                        float* out) {
    int r = lane_id() / 4, i = lane_id() % 4;
    for (int block = warp_id(); block < HEAD_DIM / 16; block += 8)
        for (int n = 0; n < BLOCKS_OF_8; n++) {
            int sum[2][2][4] = {};
#pragma unroll
            for (int plane = 0; plane < 2; plane++) {
                const int8* v = cache.values(page, head, plane) + (16 * block + r) * TILE + 16 * i;
                int4 a[2] = {*reinterpret_cast<const int4*>(v),
                             *reinterpret_cast<const int4*>(v + 8 * TILE)};
#pragma unroll
                for (int p = 0; p < 2; p++)
                    products_64(sum[plane][p], a,
                                *reinterpret_cast<const int4*>(&sh->p[p][8 * n + r][16 * i]));
            }
#pragma unroll
            for (int c = 0; c < 4; c++) {
                int query = 8 * n + 2 * i + c % 2, column = 16 * block + r + c / 2 * 8;
                float high = float(256 * sum[0][0][c] + sum[0][1][c]);
                float low = float(256 * sum[1][0][c] + sum[1][1][c]);
                if (query < GROUP)
                    out[query * HEAD_DIM + column] =
                        mul(sh->g[query], add(mul(high, 256.0f), low));
            }
        }
}

// Tiles' results merged in ascending order: one column a thread.
DEV void merge(int tiles, int head, int column, const float2* max_and_sum, const float* out,
               float* result) {
    float2 first = load_fresh(max_and_sum + head);
    float m = first.x, l = first.y, o = load_fresh(out + head * HEAD_DIM + column);
    for (int t = 1; t < tiles; t++) {
        float2 next = load_fresh(max_and_sum + t * GROUP + head);
        float v = load_fresh(out + (int64(t) * GROUP + head) * HEAD_DIM + column);
        float top = fmaxf(m, next.x);
        float a = isobit::exp(sub(m, top)), b = isobit::exp(sub(next.x, top));
        l = add(mul(l, a), mul(next.y, b));
        o = add(mul(o, a), mul(v, b));
        m = top;
    }
    *result = mul(o, div(1.0f, l));
}

// Blocks: x tiles (dealt), y key-value head. Scratch, for each key-value head: max_and_sum
// [tiles][GROUP], out [tiles][GROUP][HEAD_DIM]. arrived: a counter for each key-value head, 0 between
// launches; the last block of a head to come merges.
KERNEL(320) decode_attention(const float* qkv, const float* q_norm,
                             const float* k_norm, float eps, const float* cosines,
                             const float* sines, const Step* step, const int* pages,
                             float scale, int8* k, int8* v, float* dk, float* dv,
                             int most_tiles, float2* max_and_sum, float* out,
                             int* arrived, float* result){
    __shared__ __align__(16) AttentionShared shared;
    AttentionShared* sh = &shared;
    Cache cache = {k, v, dk, dv, KV_HEADS, HEAD_DIM};
    int head = blockIdx.y, position = step->position, tiles = position / TILE + 1;
    max_and_sum += head * most_tiles * GROUP;
    out += int64(head) * most_tiles * GROUP * HEAD_DIM;
    let_next_start();
    if (int(blockIdx.x) >= tiles) return;
    const float* cosine = cosines + int64(position) * (HEAD_DIM / 2);
    const float* sine = sines + int64(position) * (HEAD_DIM / 2);
    for (int i = threadIdx.x; i < 2 * 8 * BLOCKS_OF_8 * TILE / 4; i += ATTENTION_THREADS)
        reinterpret_cast<int*>(sh->p)[i] = 0;
    for (int i = threadIdx.x; i < 2 * 8 * BLOCKS_OF_8 * HEAD_DIM / 4; i += ATTENTION_THREADS)
        reinterpret_cast<int*>(sh->q)[i] = 0;
    wait_for_previous();
    __syncthreads();
    if (warp_id() < 8) {
        for (int query = warp_id(); query < GROUP; query += 8) {
            HeadVector x;
            x.of(qkv + (head * GROUP + query) * HEAD_DIM, q_norm, eps, cosine, sine);
#pragma unroll
            for (int i = 0; i < EACH; i++) {
                sh->q[0][query][lane_id() + WARP * i] = int8(isobit::high_plane(x.q[i]));
                sh->q[1][query][lane_id() + WARP * i] = int8(isobit::low_plane(x.q[i]));
            }
            if (lane_id() == 0) sh->dq[query] = mul(x.d, scale);
        }
    } else if ((tiles - 1) % int(gridDim.x) == int(blockIdx.x)) {  // this block has the last tile
        HeadVector x;
        int page = pages[tiles - 1], slot = position % TILE, is_v = warp_id() - 8;
        x.of(qkv + (HEADS + is_v * KV_HEADS + head) * HEAD_DIM, is_v ? nullptr : k_norm, eps, cosine,
             sine);
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            int c = lane_id() + WARP * i, at = is_v ? c * TILE + value_slot(slot) : slot * HEAD_DIM + c;
            int8 high = int8(isobit::high_plane(x.q[i])), low = int8(isobit::low_plane(x.q[i]));
            (is_v ? cache.values(page, head, 0) : cache.keys(page, head, 0))[at] = high;
            (is_v ? cache.values(page, head, 1) : cache.keys(page, head, 1))[at] = low;
        }
        if (lane_id() == 0) (is_v ? dv : dk)[cache.scales(page, head) + slot] = x.d;
    }
    __syncthreads();
    for (int t = blockIdx.x; t < tiles; t += gridDim.x) {
        int page = pages[t];
        if (warp_id() < 8) key_products(cache, page, head, sh);
        __syncthreads();
        const float* scales_k = dk + cache.scales(page, head);
        const float* scales_v = dv + cache.scales(page, head);
        if (warp_id() < 8)
            for (int query = warp_id(); query < GROUP; query += 8)
                weigh(query, min(TILE, position + 1 - t * TILE), scales_k, scales_v, sh,
                      max_and_sum + t * GROUP + query);
        __syncthreads();
        if (warp_id() < 8)
            value_products(cache, page, head, sh, out + int64(t) * GROUP * HEAD_DIM);
    }
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        int blocks = min(tiles, int(gridDim.x));
        sh->last = atomicAdd(arrived + head, 1) == blocks - 1;
        if (sh->last) arrived[head] = 0;
    }
    __syncthreads();
    if (!sh->last) return;
    __threadfence();
    for (int i = threadIdx.x; i < GROUP * HEAD_DIM; i += ATTENTION_THREADS)
        merge(tiles, i / HEAD_DIM, i % HEAD_DIM, max_and_sum, out,
              result + head * GROUP * HEAD_DIM + i);
}
