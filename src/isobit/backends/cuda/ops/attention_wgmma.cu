// Attention of many tokens on Hopper: attention_mma.cu's sums by products of warpgroups, of heads of 128.
//
// A row is a token of one query head of the group; a warpgroup holds 64 of them, in order of tokens, a warp 16.
// The block's warpgroups walk the tiles of a key-value head in ascending order, and may drift apart by as much as
// there are STAGES of tiles: some weigh while tensor cores work for others. Operands are read from shared
// memory, so that registers are left for what products and weights give. With TURNS the block's warpgroups have the
// same 64 rows and take tiles in turn, each with places of its own for them; the outputs so far lie in shared memory,
// and a warp of one warpgroup merges a tile when that of the other has merged the one before.
#define SHARED_ALIGNMENT 1024  // bits of addresses choose the order of chunks (wgmma.cuh)
#include "mirrors.cuh"
#include "weigh.cuh"
#include "wgmma.cuh"

constexpr int HEAD = 128, ROWS = 64, STEPS = HEAD / 32, CHANNEL_COLUMNS = HEAD / 8;
constexpr int GROUPS = THREADS / 128, WARPS = THREADS / WARP;  // of the block
#ifdef TURNS
constexpr int ROW_GROUPS = 1, TURN = GROUPS, AHEAD = 1;
#else
constexpr int ROW_GROUPS = GROUPS, TURN = 1, AHEAD = 2;  // tiles on their way
#endif
constexpr int STAGES = 4, OWN_STAGES = STAGES / TURN;  // tiles that are held, also by those who share them
constexpr int FETCHING = THREADS / TURN;               // threads that bring a tile
constexpr int PART = 32, IN_FLIGHT = 2;  // channels of values at once; such products under way

struct __align__(1024) KeyTile {
    uint8 k[2][KV_PAGE * 128];  // plane; a row is a key
    uint8 v[HEAD * 128];        // a row is a channel, of both planes
};
struct Shared {
    KeyTile tile[STAGES];
    uint8 q[ROW_GROUPS][2][ROWS * 128];
    __align__(16) float dk[STAGES][KV_PAGE], dv[STAGES][KV_PAGE];
    Arrival full[STAGES], empty[STAGES];
#ifdef TURNS  // the tiles so far, by the thread of a warpgroup; what each of its warps has merged
    float4 o[CHANNEL_COLUMNS][128], max_and_sum[128];
    Arrival merged[4];
#endif
};

DEV void fetch(Shared* sh, int stage, const Cache& cache, int page, int head) {
    KeyTile& to = sh->tile[stage];
    const int8 *k = cache.keys(page, head, 0), *v = cache.values(page, head, 0);
#pragma unroll
    for (int i = threadIdx.x % FETCHING; i < 2 * KV_PAGE * HEAD / 16; i += FETCHING) {
        int plane = i / (KV_PAGE * HEAD / 16), channel = i / 4 % HEAD;
        copy_async(to.k[0] + swizzled(i / 8, i % 8), k + 16 * i);
        copy_async(to.v + swizzled(channel, 4 * plane + i % 4), v + 16 * i);
    }
    int thread = threadIdx.x % FETCHING;
    if (thread < 2 * KV_PAGE / 4) {
        int i = thread % (KV_PAGE / 4) * 4;
        int64 from = cache.scales(page, head) + i;
        if (thread < KV_PAGE / 4) copy_async(sh->dk[stage] + i, cache.dk + from);
        else copy_async(sh->dv[stage] + i, cache.dv + from);
    }
}

// What a lane keeps of its two rows: g and g + 8 of its warp's 16.
struct Rows {
    float dq[2];
    int position[2];
#ifdef APART  // where the first tile's results lie, from one tile to the next, and whether there is such a row
    float2* max_and_sum[2];
    float* out[2];
    int step;
    bool there[2];
#elif defined TURNS
    float4 *o, *max_and_sum;  // of this thread
    Arrival* merged;
    int turn;  // how many tiles come before
#else
    float m[2], l[2], o[CHANNEL_COLUMNS][4];
#endif
};

// s of section 6 for the lane's keys: [column of 8 keys][fragment].
DEV void scores(Matrix q, const Shared* sh, int stage, const float (&dq)[2], float (&s)[KEY_COLUMNS][4]) {
    constexpr int N = KV_PAGE / 2;
    Matrix k = matrix_at(sh->tile[stage].k);
    int sum[2][2][N], t = lane_id() % 4;  // [plane of k][plane of q]
    products_begin();
#pragma unroll
    for (int plane = 0; plane < 2; plane++) {
#pragma unroll
        for (int step = 0; step < STEPS; step++)
#pragma unroll
            for (int p = 0; p < 2; p++)
                product_rows(sum[plane][p], q + p * (ROWS * 8) + 2 * step,
                             k + plane * (KV_PAGE * 8) + 2 * step, step > 0);
        products_commit();
    }
    float high[N];
    products_wait<1>();
    computed(sum[0][0]), computed(sum[0][1]);
#pragma unroll
    for (int i = 0; i < N; i++) high[i] = float(sum[0][0][i] * 256 + sum[0][1][i]);
    products_wait<0>();
    computed(sum[1][0]), computed(sum[1][1]);
#pragma unroll
    for (int n = 0; n < KEY_COLUMNS; n++) {
        float2 dk = *reinterpret_cast<const float2*>(sh->dk[stage] + 8 * n + 2 * t);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int low = sum[1][0][4 * n + i] * 256 + sum[1][1][4 * n + i];
            float dot = __fmaf_rn(high[4 * n + i], 256.0f, float(low));  // see combine_planes
            s[n][i] = mul(mul(dq[i / 2], i % 2 ? dk.y : dk.x), dot);
        }
    }
}

// Weights times values for a part of the channels: [plane of v][plane of the weights].
DEV void value_products(Matrix v, const int (&weights)[2][2][4], int (&sum)[2][2][PART / 2]) {
    products_begin();
#pragma unroll
    for (int step = 0; step < 2; step++)
#pragma unroll
        for (int plane = 0; plane < 2; plane++)
#pragma unroll
            for (int p = 0; p < 2; p++)
                product_rows(sum[plane][p], weights[p][step], v + 4 * plane + 2 * step, step > 0);
    products_commit();
}

// Tile n of the sequence, which some row of the warpgroup sees.
template <bool WHOLE>
DEV void add_tile(Matrix q, Shared* sh, int stage, int n, Rows& rows) {
    int weights[2][2][4];
    float p[KEY_COLUMNS][4], mt[2], lt[2], gt[2], a[2], b[2];
    int seen[2] = {rows.position[0] - n * KV_PAGE, rows.position[1] - n * KV_PAGE};
    scores(q, sh, stage, rows.dq, p);
    weigh<WHOLE>(sh->dv[stage], p, seen, mt, lt, gt, weights);
    constexpr int PARTS = HEAD / PART, AHEAD = IN_FLIGHT - 1;
    int sum[IN_FLIGHT][2][2][PART / 2];
    Matrix v = matrix_at(sh->tile[stage].v);
#pragma unroll
    for (int part = 0; part < AHEAD; part++) value_products(v + part * PART * 8, weights, sum[part]);
#ifdef APART
    bool stores[2];
    float* to[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
        stores[r] = rows.there[r] && (WHOLE || seen[r] >= 0);
        to[r] = rows.out[r] + int64(n) * rows.step * HEAD + 2 * (lane_id() % 4);
        if (stores[r] && lane_id() % 4 == 0) rows.max_and_sum[r][n * rows.step] = make_float2(mt[r], lt[r]);
    }
#elif defined TURNS
    if (rows.turn) arrival_wait(rows.merged, rows.turn - 1);
    float4 so_far = *rows.max_and_sum;
    float m[2] = {so_far.x, so_far.y}, l[2] = {so_far.z, so_far.w};
#pragma unroll
    for (int r = 0; r < 2; r++) merge_row(WHOLE || seen[r] >= 0, mt[r], lt[r], m[r], l[r], a[r], b[r]);
    *rows.max_and_sum = make_float4(m[0], m[1], l[0], l[1]);
    bool higher = __ballot_sync(~0u, a[0] != 1.0f || a[1] != 1.0f);
#else
#pragma unroll
    for (int r = 0; r < 2; r++)
        merge_row(WHOLE || seen[r] >= 0, mt[r], lt[r], rows.m[r], rows.l[r], a[r], b[r]);
    scale_outputs(rows.o, a);
#endif
#pragma unroll
    for (int part = 0; part < PARTS; part++) {
        if (part + AHEAD < PARTS) {
            value_products(v + (part + AHEAD) * PART * 8, weights, sum[(part + AHEAD) % IN_FLIGHT]);
            products_wait<AHEAD>();
        } else {
            products_wait<0>();
        }
        auto& of = sum[part % IN_FLIGHT];
        computed(of[0][0]), computed(of[0][1]), computed(of[1][0]), computed(of[1][1]);
        float next[PART / 2];
#ifdef TURNS
        float4* to = rows.o + part * (PART / 8) * 128;
        float o[PART / 2];
#pragma unroll
        for (int i = 0; i < PART / 2; i += 4) {
            float4 v = to[i / 4 * 128];
            o[i] = v.x, o[i + 1] = v.y, o[i + 2] = v.z, o[i + 3] = v.w;
        }
        if (higher)
#pragma unroll
            for (int i = 0; i < PART / 2; i++) o[i] = mul(o[i], a[i % 4 / 2]);
#endif
#pragma unroll
        for (int i = 0; i < PART / 2; i++) {
            next[i] = mul(gt[i % 4 / 2], combine_planes<2>(of[0][0][i] * 256 + of[0][1][i],
                                                           of[1][0][i] * 256 + of[1][1][i]));
#ifdef TURNS
            o[i] = add(o[i], mul(next[i], b[i % 4 / 2]));
#elif !defined APART
            float& o = rows.o[part * PART / 8 + i / 4][i % 4];
            o = add(o, mul(next[i], b[i % 4 / 2]));
#endif
        }
#ifdef TURNS
#pragma unroll
        for (int i = 0; i < PART / 2; i += 4) to[i / 4 * 128] = make_float4(o[i], o[i + 1], o[i + 2], o[i + 3]);
#endif
#ifdef APART
#pragma unroll
        for (int i = 0; i < PART / 2; i += 2)
            if (stores[i % 4 / 2])
                *reinterpret_cast<float2*>(to[i % 4 / 2] + part * PART + i / 4 * 8) = make_float2(next[i], next[i + 1]);
#endif
    }
#ifdef TURNS
    __syncwarp();
    if (lane_id() == 0) arrive(rows.merged);
#endif
}

// Block (x, y): key-value head x, span y of the batch's tokens from the last one, as the last see the most tiles.
// A span is a run of one sequence's tokens, whose rows the block has room for. OUT_HEADS: query heads of a row of
// the output.
//
// With APART a block takes every gridDim.z-th tile, whose results go to where the launch behind merges them
// (merge.cuh); a span may have no tokens.
#ifndef OUT_HEADS
#define OUT_HEADS n_heads
#endif
KERNEL(THREADS) attention_wgmma(const short* q_int, const float* dq_all, const int* positions, const int* sequence,
                              const int* pages, int pages_per_sequence, const int* span_first,
                              const int* span_count, int n_heads, int8* k, int8* v, float* dk, float* dv,
                              int kv_heads, int padded, float* out, const uint64* exchanges, float2* max_and_sum, int most_tiles) {
    begin();
    DYNAMIC_SHARED(Shared, sh);
    Cache cache = {k, v, dk, dv, kv_heads, padded};
    int lane = lane_id(), g = lane / 4, t = lane % 4, warpgroup = shuffle(int(threadIdx.x) / 128, 0);
    int group = n_heads / kv_heads, kv_head = blockIdx.x, own = gridDim.y - 1 - blockIdx.y;
    int first = span_first[own], count = span_count[own] * group, row0 = warpgroup % ROW_GROUPS * ROWS;
#ifdef APART
    if (count == 0) return;
    int begins = blockIdx.z, every = gridDim.z;
#elif defined TURNS
    int begins = warpgroup;
    constexpr int every = TURN;
#else
    constexpr int begins = 0, every = 1;
#endif
    int position0 = positions[first], furthest = position0 + span_count[own] - 1;
    const int* table = pages + sequence[first] * pages_per_sequence;
    int tiles = furthest / KV_PAGE + 1;
    auto vector = [&](int row) {  // behind the last row, the last again
        row = min(row, count - 1);
        return int64(first + row / group) * n_heads + kv_head * group + row % group;
    };

    if (threadIdx.x < STAGES) {
        arrival_init(&sh->full[threadIdx.x], WARPS / TURN);
        arrival_init(&sh->empty[threadIdx.x], WARPS / TURN);
#ifdef TURNS
        arrival_init(&sh->merged[threadIdx.x]);
#endif
    }
    auto stage_of = [&](int i) { return i % OWN_STAGES + warpgroup % TURN * OWN_STAGES; };
    auto fetch_tile = [&](int i) {  // of those of this block, or in its turn of this warpgroup
        int n = begins + i * every;
        if (n < tiles) fetch(sh, stage_of(i), cache, table[n], kv_head);
        commit_copies();
    };
    auto fetched = [&](int i) {
        wait_copies<1>();
        written_for_products();
        __syncwarp();
        if (lane == 0) arrive(&sh->full[stage_of(i)]);
    };
    for (int i = 0; i < AHEAD; i++) fetch_tile(i);
    for (int i = threadIdx.x; i < ROW_GROUPS * ROWS * HEAD / 8; i += THREADS) {
        int row = i / (HEAD / 8), c = i % (HEAD / 8);
        int4 v = *reinterpret_cast<const int4*>(q_int + vector(row) * HEAD + 8 * c);
        int high[2], low[2];
#pragma unroll
        for (int j = 0; j < 2; j++) {
            int x = j ? v.z : v.x, y = j ? v.w : v.y, four[4] = {short(x), x >> 16, short(y), y >> 16};
            high[j] = pack_high(four[0], four[1], four[2], four[3]);
            low[j] = pack_bytes(four[0], four[1], four[2], four[3]);
        }
        auto to = [&](int plane) {
            uint8* at = sh->q[row / ROWS][plane] + swizzled(row % ROWS, c / 2) + c % 2 * 8;
            return reinterpret_cast<int2*>(at);
        };
        *to(0) = make_int2(high[0], high[1]);
        *to(1) = make_int2(low[0], low[1]);
    }
    Rows rows;
    int row = row0 + warp_id() % 4 * 16 + g;  // and that + 8
#pragma unroll
    for (int r = 0; r < 2; r++) {
        rows.dq[r] = dq_all[vector(row + 8 * r)];
        rows.position[r] = position0 + min(row + 8 * r, count - 1) / group;
#ifdef APART
        int of = min(row + 8 * r, count - 1);
        int64 at = (int64(first + of / group) * kv_heads + kv_head) * most_tiles * group + of % group;
        rows.max_and_sum[r] = max_and_sum + at;
        rows.out[r] = out + at * HEAD;
        rows.step = group;
        rows.there[r] = row + 8 * r < count;
    }
#elif defined TURNS
    }
    rows.o = sh->o[0] + threadIdx.x % 128, rows.max_and_sum = sh->max_and_sum + threadIdx.x % 128;
    rows.merged = &sh->merged[warp_id() % 4];
    if (warpgroup == 0) {  // which has the first tile
        float lowest = isobit::from_bits(0xff800000u);
        *rows.max_and_sum = make_float4(lowest, lowest, -0.0f, -0.0f);
#pragma unroll
        for (int c = 0; c < CHANNEL_COLUMNS; c++) rows.o[c * 128] = make_float4(-0.0f, -0.0f, -0.0f, -0.0f);
    }
#else
        rows.m[r] = isobit::from_bits(0xff800000u), rows.l[r] = -0.0f;
    }
    // The first tile is merged like the others: -0 times its factor is what changes no value.
#pragma unroll
    for (int c = 0; c < CHANNEL_COLUMNS; c++)
#pragma unroll
        for (int i = 0; i < 4; i++) rows.o[c][i] = -0.0f;
#endif
    int nearest = position0 + row0 / group, last = position0 + (min(row0 + ROWS, count) - 1) / group;
    int seen = row0 < count ? last / KV_PAGE + 1 : 0;  // tiles
    int whole = (nearest + 1) / KV_PAGE;
    Matrix q = matrix_at(sh->q[warpgroup % ROW_GROUPS]);
    written_for_products();
    __syncthreads();
    for (int i = 0; i < AHEAD - 1; i++) fetched(i);
#pragma unroll 1
    for (int i = 0, n = begins; n < tiles; i++, n += every) {
        int stage = stage_of(i), next = i + AHEAD;
        if (next >= OWN_STAGES && n + AHEAD * every < tiles)
            arrival_wait(&sh->empty[stage_of(next)], next / OWN_STAGES - 1);
        fetch_tile(next);
        fetched(next - 1);
        arrival_wait(&sh->full[stage], i / OWN_STAGES);
#ifdef TURNS
        rows.turn = n;
#endif
        if (n < whole && n < seen) add_tile<true>(q, sh, stage, n, rows);
        else if (n < seen) add_tile<false>(q, sh, stage, n, rows);
        __syncwarp();
        if (lane == 0) arrive(&sh->empty[stage]);
    }
#ifdef TURNS
    if ((tiles - 1) % TURN != warpgroup) return;  // who has the last tile has the result
    float4 max_and_sum_of = *rows.max_and_sum;
    const float l[2] = {max_and_sum_of.z, max_and_sum_of.w};
    auto outputs = [&](int c, int r) {
        float4 o = rows.o[c * 128];
        return r ? make_float2(o.z, o.w) : make_float2(o.x, o.y);
    };
#elif !defined APART
    const float(&l)[2] = rows.l;
    auto outputs = [&](int c, int r) { return make_float2(rows.o[c][2 * r], rows.o[c][2 * r + 1]); };
#endif
#ifndef APART
    Mirrors mirrors(exchanges);
#pragma unroll
    for (int r = 0; r < 2; r++) {
        int of = row + 8 * r;
        if (of >= count) continue;
        float scale = div(1.0f, l[r]);
        int64 head = int64(first + of / group) * OUT_HEADS + kv_head * group + of % group;
        float* to = out + head * HEAD + 2 * t;
#pragma unroll
        for (int c = 0; c < CHANNEL_COLUMNS; c++) {
            float2 o = outputs(c, r);
            mirrors.store(reinterpret_cast<float2*>(to + 8 * c), make_float2(mul(o.x, scale), mul(o.y, scale)));
        }
    }
#endif
}
