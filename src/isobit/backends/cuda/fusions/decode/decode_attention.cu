// Attention of one token of each sequence (docs/numerics.md, section 6): head vectors and tiles in one
// kernel. Integer products are tensor-core products of 8-bit planes, so they need HEAD_DIM % 64 == 0.
//
// With KIN, up to so many tokens that follow one another may be of one sequence. Nobody waits for the keys
// and values of those before it: each makes them for itself.
#ifndef AT_ONCE
#define AT_ONCE 3
#endif
#include "cache.cuh"
#include "merge.cuh"
#include "mma.cuh"

constexpr int BLOCKS_OF_8 = (GROUP + 7) / 8;  // products have 8 columns: query heads
constexpr int EACH = HEAD_DIM / WARP;         // values of a head vector in a lane: lane + 32 i
constexpr int ATTENTION_THREADS = 320;
#ifndef KIN
#define KIN 1
#endif
// A tile of one key-value head, as the cache holds it.
struct TileBytes {
    int8 k[2][TILE][HEAD_DIM];
    int8 v[2][HEAD_DIM][TILE];
    float dk[TILE], dv[TILE];
};
struct AttentionShared {
    TileBytes tile[BUFFERS];
    int8 k[KIN][2][HEAD_DIM], v[KIN][2][HEAD_DIM];  // of this token, then of those before it
    int8 q[2][8 * BLOCKS_OF_8][HEAD_DIM];           // planes
    union __align__(16) {                  // of a query head
        int dot[2][TILE];                  // with the planes of k
        int8 p[2][TILE];                   // planes of the weights, from then on
        int8 bytes[8 * TILE + 16];         // so that four heads' dots are stored to banks of their own
    } head[8 * BLOCKS_OF_8];
    float dq[8 * BLOCKS_OF_8], g[8 * BLOCKS_OF_8], dk[KIN], dv[KIN];
    uint64 arrival[BUFFERS][2];  // of k and of v
};

// The block's tiles on their way to shared memory, BUFFERS of them, k and v each for itself.
struct Fetches {
    AttentionShared* sh;
    Cache cache;
    int head;

#ifdef BULK_COPIES
    DEV void prepare() const {
        if (threadIdx.x < 2 * BUFFERS) arrival_init(&sh->arrival[threadIdx.x / 2][threadIdx.x % 2]);
        __syncthreads();
    }
    DEV void fetch(int n, int page, int which) const {
        if (threadIdx.x) return;
        TileBytes& to = sh->tile[n % BUFFERS];
        Arrival* a = &sh->arrival[n % BUFFERS][which];
        arrival_expect(a, sizeof to.k + sizeof to.dk);
        copy_bulk_once(which ? to.v[0][0] : to.k[0][0],
                       which ? cache.values(page, head, 0) : cache.keys(page, head, 0), sizeof to.k, a);
        copy_bulk_once(which ? to.dv : to.dk, (which ? cache.dv : cache.dk) + cache.scales(page, head),
                       sizeof to.dk, a);
    }
    DEV void none() const {}
    DEV void wait(int n, int which) const {
        arrival_wait(&sh->arrival[n % BUFFERS][which], n / BUFFERS);
    }
#else
    DEV void prepare() const {}
    DEV void fetch(int n, int page, int which) const {
        TileBytes& tile = sh->tile[n % BUFFERS];
        int8* to = which ? tile.v[0][0] : tile.k[0][0];
        const int8* from = which ? cache.values(page, head, 0) : cache.keys(page, head, 0);
        for (int i = 16 * threadIdx.x; i < int(sizeof tile.k); i += 16 * ATTENTION_THREADS)
            copy_async(to + i, from + i);
        int i = 4 * threadIdx.x;
        if (i < TILE)
            copy_async((which ? tile.dv : tile.dk) + i,
                       (which ? cache.dv : cache.dk) + cache.scales(page, head) + i);
        commit_copies();
    }
    DEV void none() const { commit_copies(); }  // in place of a tile, so that they can be counted
    DEV void wait(int, int which) const {
        if (which) wait_copies<2 * BUFFERS - 2>();
        else wait_copies<2 * BUFFERS - 1>();
    }
#endif
};

// Norm, RoPE (of q and k) and quantisation of one head vector by one warp.
struct HeadVector {
    float weight[EACH], cosine[EACH / 2], sine[EACH / 2];  // fetched ahead
    int q[EACH];
    float d;

    DEV void fetch(const float* norm, const float* cosines, const float* sines) {
#pragma unroll
        for (int i = 0; i < EACH; i++) weight[i] = norm[lane_id() + WARP * i];
#pragma unroll
        for (int i = 0; i < EACH / 2; i++) {
            cosine[i] = cosines[lane_id() + WARP * i];
            sine[i] = sines[lane_id() + WARP * i];
        }
    }
    DEV void of(const float* x, bool turned) {
        float v[EACH];
#pragma unroll
        for (int i = 0; i < EACH; i++) v[i] = x[lane_id() + WARP * i];
        if (turned) turn(v);
        uint32 amax = 0;
#pragma unroll
        for (int i = 0; i < EACH; i++) amax = max(amax, magnitude(v[i]));
        isobit::BlockScale scale = isobit::block_scale(warp_max(amax), 2);
#pragma unroll
        for (int i = 0; i < EACH; i++) q[i] = quantised(v[i], scale);
        d = scale.d;
    }
    float eps;
    DEV void turn(float (&v)[EACH]) {
        float sum[8] = {};  // 256 lanes of sum256: lane + 32 i
#pragma unroll
        for (int i = 0; i < EACH; i++) sum[i % 8] = add(sum[i % 8], mul(v[i], v[i]));
        for (int n = 4; n; n /= 2)
            for (int i = 0; i < n; i++) sum[i] = add(sum[i], sum[i + n]);
        float mean = div(warp_tree(sum[0]), float(HEAD_DIM));
        float r = div(1.0f, square_root(add(mean, eps)));
#pragma unroll
        for (int i = 0; i < EACH; i++) v[i] = mul(mul(v[i], r), weight[i]);
#pragma unroll
        for (int i = 0; i < EACH / 2; i++) {
            float a = v[i], b = v[i + EACH / 2];
            v[i] = sub(mul(a, cosine[i]), mul(b, sine[i]));
            v[i + EACH / 2] = add(mul(b, cosine[i]), mul(a, sine[i]));
        }
    }
};

// Sixteen bytes of each operand, as two products of depth 32: lane 4r + i holds bytes 16i … 16i+15 of
// row r (and r + 8 in a[1]), and of column r of b.
DEV void products_64(int (&c)[4], const int4 (&a)[2], int4 b) {
    product32(c, {a[0].x, a[1].x, a[0].y, a[1].y}, b.x, b.y);
    product32(c, {a[0].z, a[1].z, a[0].w, a[1].w}, b.z, b.w);
}

// Scores of the tile's 64 keys: warp w takes keys 16(w%4) … +15 and plane w/4 of k.
DEV void key_products(const TileBytes& tile, AttentionShared* sh) {
    int block = warp_id() % 4, plane = warp_id() / 4, r = lane_id() / 4, i = lane_id() % 4;
    const int8* k = tile.k[plane][16 * block + r] + 16 * i;
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
            sh->head[8 * n + 2 * i + c % 2].dot[plane][16 * block + r + c / 2 * 8] =
                256 * sum[0][c] + sum[1][c];
    }
}

// One head's weights of the tile by one warp: (m_t, l_t), P and g.
DEV void weigh(int head, int seen, const TileBytes& tile, AttentionShared* sh,
               float2* max_and_sum) {
    float s[2], p[2], weighted[2], m = isobit::from_bits(0xff800000u);
#pragma unroll
    for (int i = 0; i < 2; i++) {
        int j = lane_id() + WARP * i;
        float dot = join_planes<2>(sh->head[head].dot[0][j], sh->head[head].dot[1][j]);
        s[i] = j < seen ? mul(mul(sh->dq[head], tile.dk[j]), dot) : m;
    }
    m = warp_max(fmaxf(s[0], s[1]));
    uint32 amax = 0;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        int j = lane_id() + WARP * i;
        p[i] = isobit::exp(sub(s[i], m));  // no branch: both are under way at once
        p[i] = j < seen ? p[i] : 0.0f;
        weighted[i] = j < seen ? mul(p[i], tile.dv[j]) : 0.0f;
        amax = max(amax, magnitude(weighted[i]));
    }
    isobit::BlockScale scale = isobit::block_scale(warp_max(amax), 2);
    __syncwarp();  // p takes the place of what all lanes have read
#pragma unroll
    for (int i = 0; i < 2; i++) {
        int q = quantised(weighted[i], scale), j = lane_id() + WARP * i;
        sh->head[head].p[0][value_slot(j)] = int8(isobit::high_plane(q));
        sh->head[head].p[1][value_slot(j)] = int8(isobit::low_plane(q));
    }
    float l = warp_tree(add(p[0], p[1]));
    if (lane_id() == 0) {
        sh->g[head] = scale.d;
        *max_and_sum = make_float2(m, l);
    }
}

// The tile's outputs: warp w takes columns 16w … 16w+15. out: [GROUP][HEAD_DIM].
DEV void value_products(const TileBytes& tile, const AttentionShared* sh, float* out) {
    int r = lane_id() / 4, i = lane_id() % 4;
    for (int block = warp_id(); block < HEAD_DIM / 16; block += 8)
        for (int n = 0; n < BLOCKS_OF_8; n++) {
            int sum[2][2][4] = {};
#pragma unroll
            for (int plane = 0; plane < 2; plane++) {
                const int8* v = tile.v[plane][16 * block + r] + 16 * i;
                int4 a[2] = {*reinterpret_cast<const int4*>(v),
                             *reinterpret_cast<const int4*>(v + 8 * TILE)};
#pragma unroll
                for (int p = 0; p < 2; p++)
                    products_64(sum[plane][p], a,
                                *reinterpret_cast<const int4*>(&sh->head[8 * n + r].p[p][16 * i]));
            }
#pragma unroll
            for (int c = 0; c < 4; c++) {
                int query = 8 * n + 2 * i + c % 2, column = 16 * block + r + c / 2 * 8;
                int high = 256 * sum[0][0][c] + sum[0][1][c];
                int low = 256 * sum[1][0][c] + sum[1][1][c];
                if (query < GROUP)
                    out[query * HEAD_DIM + column] = mul(sh->g[query], join_planes<2>(high, low));
            }
        }
}

// Blocks: x tiles (dealt), y key-value head, z token. of: the number of each token's sequence, read if
// there is KIN. Results for each tile: merge.cuh.
KERNEL(320) decode_attention(const float* qkv, const float* q_norm, const float* k_norm, float eps,
                             const float* cosines, const float* sines, const int* positions,
                             const int* pages, float scale, int8* k, int8* v, float* dk, float* dv,
                             int most_tiles, const int* of, float2* max_and_sum, float* out) {
    mark(6, 0);
    DYNAMIC_SHARED(AttentionShared, sh);
    Cache cache = {k, v, dk, dv, KV_HEADS, HEAD_DIM};
    int head = blockIdx.y, sequence = blockIdx.z, position = positions[sequence];
    int tiles = position / TILE + 1, t = blockIdx.x;
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
    // Vector i of k or v is of the token so many before this one; whether this block has its tile.
    auto back = [&](int i) { return KIN == 1 || i < GROUP ? 0 : (i - GROUP) / 2; };
    auto has = [&](int back) {
        return (KIN == 1 ? tiles - 1 : (position - back) / TILE) % int(gridDim.x) == int(blockIdx.x);
    };
    HeadVector x;
    x.eps = eps;
    auto fetch_turn = [&](int i) {
        int at = (position - back(i)) * (HEAD_DIM / 2);
        x.fetch(i < GROUP ? q_norm : k_norm, cosines + at, sines + at);
    };
    if (KIN == 1 || warp_id() < vectors) fetch_turn(warp_id());
    let_next_start();
    for (int i = threadIdx.x; i < int(sizeof sh->q) / 4; i += ATTENTION_THREADS)
        reinterpret_cast<int*>(sh->q)[i] = 0;  // heads that are not there stay so
    __syncthreads();
    wait_for_previous();
    mark(6, 1);
#pragma unroll 1
    for (int i = warp_id(); i < vectors; i += VECTOR_WARPS) {
        int b = back(i), at = position - b;
        bool is_q = i < GROUP, is_k = KIN == 1 ? i == GROUP : !is_q && (i - GROUP) % 2 == 0;
        if (!is_q && !has(b)) {
            if (KIN == 1) break;
            continue;
        }
        if (i >= VECTOR_WARPS) fetch_turn(i);
        int vector = is_q ? head * GROUP + i : is_k ? HEADS + head : HEADS + KV_HEADS + head;
        x.of(qkv + (int64(sequence - b) * (HEADS + 2 * KV_HEADS) + vector) * HEAD_DIM, is_q || is_k);
        int page = pages[KIN == 1 ? tiles - 1 : at / TILE], slot = at % TILE;
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
                    if (b == 0) cache.keys(page, head, p)[slot * HEAD_DIM + c] = plane[p];
                } else {
                    sh->v[b][p][c] = plane[p];
                    if (b == 0) cache.values(page, head, p)[c * TILE + value_slot(slot)] = plane[p];
                }
        }
        if (lane_id() == 0) {
            if (is_q) sh->dq[i] = mul(x.d, scale);
            else (is_k ? sh->dk : sh->dv)[b] = x.d;
            if (!is_q && b == 0) (is_k ? dk : dv)[cache.scales(page, head) + slot] = x.d;
        }
    }
    for (int n = 1; n < BUFFERS; n++) fetch(n, 0), fetch(n, 1);
    __syncthreads();
    mark(6, 2);
    int64 result = (int64(sequence) * KV_HEADS + head) * most_tiles * GROUP;
    max_and_sum += result;
    out += result * HEAD_DIM;
    for (int n = 0; t < tiles; n++, t += gridDim.x) {
        TileBytes& tile = sh->tile[n % BUFFERS];
        fetches.wait(n, 0);
        __syncthreads();  // k is there
        // Tokens of this step, which the tile may have been fetched without.
        bool fresh = t == tiles - 1 || (KIN > 1 && t >= (position - kin + 1) / TILE);
        if (fresh) {
#pragma unroll 1
            for (int b = 0; b < kin; b++) {
                int slot = position - b - t * TILE;
                if (KIN > 1 && (slot < 0 || slot >= TILE)) continue;
                for (int c = threadIdx.x; c < 2 * HEAD_DIM; c += ATTENTION_THREADS)
                    tile.k[c / HEAD_DIM][slot][c % HEAD_DIM] = (&sh->k[b][0][0])[c];
                if (threadIdx.x == 0) tile.dk[slot] = sh->dk[b];
            }
            __syncthreads();
        }
        if (warp_id() < 8) key_products(tile, sh);
        fetches.wait(n, 1);
        __syncthreads();
        if (fresh) {
#pragma unroll 1
            for (int b = 0; b < kin; b++) {
                int slot = position - b - t * TILE;
                if (KIN > 1 && (slot < 0 || slot >= TILE)) continue;
                for (int c = threadIdx.x; c < 2 * HEAD_DIM; c += ATTENTION_THREADS)
                    tile.v[c / HEAD_DIM][c % HEAD_DIM][value_slot(slot)] = (&sh->v[b][0][0])[c];
                if (threadIdx.x == 0) tile.dv[slot] = sh->dv[b];
            }
            __syncthreads();
        }
        if (warp_id() < 8)
            for (int query = warp_id(); query < GROUP; query += 8)
                weigh(query, min(TILE, position + 1 - t * TILE), tile, sh,
                      max_and_sum + t * GROUP + query);
        __syncthreads();
        fetch(n + BUFFERS, 0);
        if (warp_id() < 8) value_products(tile, sh, out + int64(t) * GROUP * HEAD_DIM);
        if (t + BUFFERS * int(gridDim.x) < tiles) __syncthreads();  // nobody needs tile n
        fetch(n + BUFFERS, 1);
    }
    mark(6, 3);
}
