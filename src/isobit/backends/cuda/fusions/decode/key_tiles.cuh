// Tiles of keys of one key-value head and a group of query heads, on tensor cores (docs/numerics.md,
// section 6). Integer products are of 8-bit planes, so they need HEAD_DIM % 64 == 0.
#pragma once
#ifndef AT_ONCE
#define AT_ONCE 3
#endif
#include "cache.cuh"
#include "merge.cuh"
#include "mma.cuh"

constexpr int BLOCKS_OF_8 = (GROUP + 7) / 8;  // products have 8 columns: query heads
constexpr int ATTENTION_THREADS = 320;
#ifndef KIN
#define KIN 1
#endif
// A tile of one key-value head, as the cache holds it.
struct TileBytes {
    int8 k[2][KV_PAGE][HEAD_DIM];
    int8 v[2][HEAD_DIM][KV_PAGE];
    float dk[KV_PAGE], dv[KV_PAGE];
};
// Of the tiles so far: maximum, sum, and the factors of what is there and of the newest tile.
struct Merge {
    float m, l, old, newest;
};
struct AttentionShared {
    TileBytes key_tile[BUFFERS];
    int8 k[KIN][2][HEAD_DIM], v[KIN][2][HEAD_DIM];  // of this token, then of those before it
    int8 q[2][8 * BLOCKS_OF_8][HEAD_DIM];           // planes
    union __align__(16) {                  // of a query head
        int dot[2][KV_PAGE];                  // with the planes of k
        int8 p[2][KV_PAGE];                   // planes of the weights, from then on
        int8 bytes[8 * KV_PAGE + 16];         // so that four heads' dots are stored to banks of their own
    } head[8 * BLOCKS_OF_8];
    float dq[8 * BLOCKS_OF_8], g[8 * BLOCKS_OF_8], dk[KIN], dv[KIN];
    Merge merge[8 * BLOCKS_OF_8];  // of a query head
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
        TileBytes& to = sh->key_tile[n % BUFFERS];
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
        TileBytes& key_tile = sh->key_tile[n % BUFFERS];
        int8* to = which ? key_tile.v[0][0] : key_tile.k[0][0];
        const int8* from = which ? cache.values(page, head, 0) : cache.keys(page, head, 0);
        for (int i = 16 * threadIdx.x; i < int(sizeof key_tile.k); i += 16 * ATTENTION_THREADS)
            copy_async(to + i, from + i);
        int i = 4 * threadIdx.x;
        if (i < KV_PAGE)
            copy_async((which ? key_tile.dv : key_tile.dk) + i,
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

// Sixteen bytes of each operand, as two products of depth 32: lane 4r + i holds bytes 16i … 16i+15 of
// row r (and r + 8 in a[1]), and of column r of b.
DEV void products_64(int (&c)[4], const int4 (&a)[2], int4 b) {
    product32(c, {a[0].x, a[1].x, a[0].y, a[1].y}, b.x, b.y);
    product32(c, {a[0].z, a[1].z, a[0].w, a[1].w}, b.z, b.w);
}

// Scores of the tile's 64 keys: warp w takes keys 16(w%4) … +15 and plane w/4 of k.
DEV void key_products(const TileBytes& key_tile, AttentionShared* sh) {
    int block = warp_id() % 4, plane = warp_id() / 4, r = lane_id() / 4, i = lane_id() % 4;
    const int8* k = key_tile.k[plane][16 * block + r] + 16 * i;
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
DEV float2 weigh(int head, int seen, const TileBytes& key_tile, AttentionShared* sh) {
    float s[2], p[2], weighted[2], m = isobit::from_bits(0xff800000u);
#pragma unroll
    for (int i = 0; i < 2; i++) {
        int j = lane_id() + WARP * i;
        float dot = combine_planes<2>(sh->head[head].dot[0][j], sh->head[head].dot[1][j]);
        s[i] = j < seen ? mul(mul(sh->dq[head], key_tile.dk[j]), dot) : m;
    }
    m = warp_max(fmaxf(s[0], s[1]));
    uint32 amax = 0;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        int j = lane_id() + WARP * i;
        p[i] = isobit::exp(sub(s[i], m));  // no branch: both are under way at once
        p[i] = j < seen ? p[i] : 0.0f;
        weighted[i] = j < seen ? mul(p[i], key_tile.dv[j]) : 0.0f;
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
    if (lane_id() == 0) sh->g[head] = scale.d;
    return make_float2(m, l);
}

constexpr int COLUMN_BLOCKS = (HEAD_DIM / 16 + 7) / 8;  // of a warp
typedef float Outputs[COLUMN_BLOCKS][BLOCKS_OF_8][4];  // of a lane
DEV int query_of(int n, int c) { return 8 * n + lane_id() % 4 * 2 + c % 2; }
DEV int column_of(int b, int c) { return 16 * (warp_id() + 8 * b) + lane_id() / 4 + c / 2 * 8; }

// The tile's outputs: warp w takes columns 16w … 16w+15. f(b, n, c, value) is called with those of a lane.
template <class F>
DEV void value_products(const TileBytes& key_tile, const AttentionShared* sh, F f) {
    int r = lane_id() / 4, i = lane_id() % 4;
#pragma unroll
    for (int b = 0; b < COLUMN_BLOCKS; b++) {
        int block = warp_id() + 8 * b;
        if (block >= HEAD_DIM / 16) break;
#pragma unroll
        for (int n = 0; n < BLOCKS_OF_8; n++) {
            int sum[2][2][4] = {};
#pragma unroll
            for (int plane = 0; plane < 2; plane++) {
                const int8* v = key_tile.v[plane][16 * block + r] + 16 * i;
                int4 a[2] = {*reinterpret_cast<const int4*>(v),
                             *reinterpret_cast<const int4*>(v + 8 * KV_PAGE)};
#pragma unroll
                for (int p = 0; p < 2; p++)
                    products_64(sum[plane][p], a,
                                *reinterpret_cast<const int4*>(&sh->head[8 * n + r].p[p][16 * i]));
            }
#pragma unroll
            for (int c = 0; c < 4; c++) {
                int query = query_of(n, c);
                int high = 256 * sum[0][0][c] + sum[0][1][c];
                int low = 256 * sum[1][0][c] + sum[1][1][c];
                if (query < GROUP) f(b, n, c, mul(sh->g[query], combine_planes<2>(high, low)));
            }
        }
    }
}

// The block's tiles in turn, from blockIdx.x on, every gridDim.x-th; the first has been fetched, or as many
// as there are BUFFERS. fetch(n, which): k (0) or v (1) of the block's tile n. lacks(t): whether a tile was
// fetched without some tokens, which patch(t, tile) then writes, with a barrier behind. weighed(i, query, m and
// l), for each query of the warp, its i-th, and found(t, b, n, c, output): results. ended(t): no other warp of the block waits for what it does.
constexpr int QUERIES_EACH = (GROUP + 7) / 8;
template <class Fetch, class Lacks, class Patch, class Weighed, class Found, class Ended>
DEV void tiles_in_turn(const Fetches& fetches, int position, int tiles, Fetch fetch, Lacks lacks, Patch patch,
                       Weighed weighed, Found found, Ended ended) {
    AttentionShared* sh = fetches.sh;
    int t = blockIdx.x;
    for (int n = 0; t < tiles; n++, t += gridDim.x) {
        TileBytes& key_tile = sh->key_tile[n % BUFFERS];
        fetches.wait(n, 0);
        if (lacks(t)) fetches.wait(n, 1);
        __syncthreads();  // k is there
        if (lacks(t)) patch(t, key_tile);
        if (warp_id() < 8) key_products(key_tile, sh);
        fetches.wait(n, 1);
        __syncthreads();
        if (warp_id() < 8)
#pragma unroll
            for (int i = 0; i < QUERIES_EACH; i++) {
                int query = warp_id() + 8 * i;
                if (query < GROUP)
                    weighed(i, query, weigh(query, min(KV_PAGE, position + 1 - t * KV_PAGE), key_tile, sh));
            }
        __syncthreads();
        fetch(n + BUFFERS, 0);
        if (warp_id() < 8)
            value_products(key_tile, sh, [&](int b, int n, int c, float v) { found(t, b, n, c, v); });
        if (t + BUFFERS * int(gridDim.x) < tiles) __syncthreads();  // nobody needs tile n
        fetch(n + BUFFERS, 1);
        ended(t);
    }
}

// Those of a token and a key-value head go to where the launch behind merges them (merge.cuh) or, with
// MERGED, are merged here, one block having all tiles, and quantised for the product behind.
template <class Fetch, class Lacks, class Patch>
DEV void attend(const Fetches& fetches, int token, int position, int tiles, Fetch fetch, Lacks lacks, Patch patch,
                int most_tiles, float2* max_and_sum, float* out, ActivationBlock* acts) {
    AttentionShared* sh = fetches.sh;
    int64 vector = int64(token) * KV_HEADS + fetches.head;  // GROUP of them
#ifdef MERGED
    static_assert(GROUP * HEAD_DIM % SUPER == 0 && GROUP * HEAD_DIM * 4 <= sizeof(TileBytes), "whole superblocks");
    constexpr int SUPERS = GROUP * HEAD_DIM / SUPER;
    Outputs o = {};
    if (threadIdx.x < GROUP) sh->merge[threadIdx.x] = {isobit::from_bits(0xff800000u), 0.0f, 0.0f, 0.0f};
    tiles_in_turn(
        fetches, position, tiles, fetch, lacks, patch,
        [&](int, int query, float2 ml) {
            Merge& of = sh->merge[query];
            float m = of.m, a, b;
            merge_factors(m, ml.x, a, b);
            float l = add(mul(of.l, a), mul(ml.y, b));
            __syncwarp();
            if (lane_id() == 0) of = {m, l, a, b};
        },
        [&](int, int b, int n, int c, float v) {
            const Merge& of = sh->merge[query_of(n, c)];
            o[b][n][c] = add(mul(o[b][n][c], of.old), mul(v, of.newest));
        },
        [](int) {});
    __syncthreads();  // nobody needs the last tile
    float* whole = reinterpret_cast<float*>(sh->key_tile);
#pragma unroll
    for (int b = 0; b < COLUMN_BLOCKS; b++)
#pragma unroll
        for (int n = 0; n < BLOCKS_OF_8; n++)
#pragma unroll
            for (int c = 0; c < 4; c++) {
                int query = query_of(n, c), column = column_of(b, c);
                if (warp_id() < 8 && query < GROUP && column < HEAD_DIM)
                    whole[query * HEAD_DIM + column] = mul(o[b][n][c], div(1.0f, sh->merge[query].l));
            }
    __syncthreads();
    for (int s = warp_id(); s < SUPERS; s += ATTENTION_THREADS / WARP) {
        float v[8];
        load8(whole + SUPER * s + 8 * lane_id(), v);
        quantise_superblock(v, acts + vector * SUPERS + s);
    }
#else
    max_and_sum += vector * most_tiles * GROUP;
    out += vector * most_tiles * GROUP * HEAD_DIM;
    float2 ml[QUERIES_EACH];
    tiles_in_turn(
        fetches, position, tiles, fetch, lacks, patch,
        [&](int i, int, float2 of) { ml[i] = of; },
        [&](int t, int b, int n, int c, float v) {
            out[int64(t * GROUP + query_of(n, c)) * HEAD_DIM + column_of(b, c)] = v;
        },
        [&](int t) {
#pragma unroll
            for (int i = 0; i < QUERIES_EACH; i++)
                if (int query = warp_id() + 8 * i; warp_id() < 8 && query < GROUP && lane_id() == 0)
                    max_and_sum[t * GROUP + query] = ml[i];
        });
#endif
}
