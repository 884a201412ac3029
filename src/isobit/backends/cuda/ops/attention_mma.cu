// Attention of many tokens: int8 tensor-core products of both planes of q, k, the weights and v
// (docs/numerics.md, section 6). Compiled for one head_dim, HEAD: 64, 96 or 128.
//
// A warp holds 16 tokens of one query head; the eight warps of a block share a key-value head and
// walk its tiles in ascending order, STAGE of them at a time, the next ones on their way meanwhile. In a
// stage of two, warps may drift apart: some weigh while tensor cores work for others. Integer sums may
// take the keys of a tile in any order, so v's positions lie in value_slot's order: four that one
// lane holds of the scores are then one register of the next product.
#include "mirrors.cuh"
#include "mma.cuh"
#include "weigh.cuh"

constexpr int K_STRIDE = HEAD + 16, V_STRIDE = KV_PAGE + 16;  // bytes; no bank is met twice
constexpr int STEPS = HEAD / 32, CHANNEL_COLUMNS = HEAD / 8;

struct KeyTile {
    uint8 k[2][KV_PAGE * K_STRIDE];
    uint8 v[2][HEAD * V_STRIDE];
    float dk[KV_PAGE], dv[KV_PAGE];
};

DEV void fetch(KeyTile& to, const Cache& cache, int page, int head) {
    for (int i = threadIdx.x; i < 2 * KV_PAGE * HEAD / 16; i += THREADS) {
        int plane = i / (KV_PAGE * HEAD / 16), chunk = i % (KV_PAGE * HEAD / 16);
        int key = chunk / (HEAD / 16), at = chunk % (HEAD / 16) * 16;
        copy_async(to.k[plane] + key * K_STRIDE + at, cache.keys(page, head, plane) + chunk * 16);
        int channel = chunk / (KV_PAGE / 16), slot = chunk % (KV_PAGE / 16) * 16;
        copy_async(to.v[plane] + channel * V_STRIDE + slot,
                   cache.values(page, head, plane) + chunk * 16);
    }
    if (threadIdx.x < 2 * KV_PAGE / 4) {
        int i = threadIdx.x % (KV_PAGE / 4) * 4;
        int64 from = cache.scales(page, head) + i;
        if (threadIdx.x < KV_PAGE / 4) copy_async(to.dk + i, cache.dk + from);
        else copy_async(to.dv + i, cache.dv + from);
    }
}

// s of section 6 for the lane's keys: [column of 8 keys][fragment].
DEV void scores(const KeyTile& key_tile, const int (&q)[2][STEPS][4], const float (&dq)[2],
                float (&s)[KEY_COLUMNS][4]) {
    int lane = lane_id(), t = lane % 4;
#pragma unroll
    for (int n = 0; n < KEY_COLUMNS; n++) {
        int half[2][4];  // sums with k's high and low plane
#pragma unroll
        for (int p = 0; p < 2; p++) {
            int high[4] = {}, low[4] = {};
            SharedAddress row = shared_address(key_tile.k[p] + (8 * n + lane % 8) * K_STRIDE);
#pragma unroll
            for (int step = 0; step < STEPS; step += 2) {
                int b[4];  // with an odd number of steps the last two are not used
                load_matrices(b, row + min(32 * step + lane / 8 * 16, HEAD - 16));
                product32(high, q[0][step], b[0], b[1]);
                product32(low, q[1][step], b[0], b[1]);
                if (step + 1 < STEPS) {
                    product32(high, q[0][step + 1], b[2], b[3]);
                    product32(low, q[1][step + 1], b[2], b[3]);
                }
            }
#pragma unroll
            for (int i = 0; i < 4; i++) half[p][i] = high[i] * 256 + low[i];
        }
        float2 dk = *reinterpret_cast<const float2*>(key_tile.dk + 8 * n + 2 * t);
#pragma unroll
        for (int i = 0; i < 4; i++)
            s[n][i] = mul(mul(dq[i / 2], i % 2 ? dk.y : dk.x),
                          combine_planes<2>(half[0][i], half[1][i]));
    }
}

// What a lane keeps of its two rows, which are tokens of one query head: rows g and g + 8 of 16.
struct Rows {
    int q[2][STEPS][4];
    float dq[2];
    int position[2];
    float m[2], l[2], o[CHANNEL_COLUMNS][4];
};

// Tile n of the sequence, which some row of the warp sees.
template <bool WHOLE>
DEV void add_tile(const KeyTile& key_tile, int n, Rows& rows) {
    int lane = lane_id(), weights[2][2][4];
    float p[KEY_COLUMNS][4], mt[2], lt[2], gt[2], a[2], b[2];
    int seen[2] = {rows.position[0] - n * KV_PAGE, rows.position[1] - n * KV_PAGE};
    scores(key_tile, rows.q, rows.dq, p);
    weigh<WHOLE>(key_tile.dv, p, seen, mt, lt, gt, weights);
#pragma unroll
    for (int r = 0; r < 2; r++)
        merge_row(WHOLE || seen[r] >= 0, mt[r], lt[r], rows.m[r], rows.l[r], a[r], b[r]);
    scale_outputs(rows.o, a);
#pragma unroll
    for (int c = 0; c < CHANNEL_COLUMNS; c++) {
        int half[2][4];
#pragma unroll
        for (int plane = 0; plane < 2; plane++) {
            int v[4], high[4] = {}, low[4] = {};
            load_matrices(v, shared_address(key_tile.v[plane] + (8 * c + lane % 8) * V_STRIDE +
                                            lane / 8 * 16));
            product32(high, weights[0][0], v[0], v[1]);
            product32(low, weights[1][0], v[0], v[1]);
            product32(high, weights[0][1], v[2], v[3]);
            product32(low, weights[1][1], v[2], v[3]);
#pragma unroll
            for (int i = 0; i < 4; i++) half[plane][i] = high[i] * 256 + low[i];
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float next = mul(gt[i / 2], combine_planes<2>(half[0][i], half[1][i]));
            rows.o[c][i] = add(rows.o[c][i], mul(next, b[i / 2]));
        }
    }
}

// Block (x, y, z): key-value head x, span y of the batch's tokens from the last one, as the last see the
// most tiles; query heads 8z … of its group. A span is a run of one sequence's tokens, at most 16 for
// each of the block's warps that share a head. OUT_HEADS: query heads of a row of the output.
#ifndef OUT_HEADS
#define OUT_HEADS n_heads
#endif
KERNEL(THREADS) attention_mma(const short* q_int, const float* dq_all, const int* positions,
                              const int* sequence, const int* pages, int pages_per_sequence,
                              const int* span_first, const int* span_count, int n_heads,
                              int8* k, int8* v, float* dk, float* dv, int kv_heads, int padded,
                              float* out, const uint64* exchanges) {
    begin();
    DYNAMIC_SHARED(KeyTile, tiles);
    Cache cache = {k, v, dk, dv, kv_heads, padded};
    constexpr int WARPS = THREADS / WARP, ROWS = 16;
    int lane = lane_id(), g = lane / 4, t = lane % 4;
    int group = n_heads / cache.heads, kv_head = blockIdx.x, heads_here = min(group, WARPS);
    int own = gridDim.y - 1 - blockIdx.y;
    int head_in_group = blockIdx.z * WARPS + warp_id() % heads_here;
    int begin = warp_id() / heads_here * ROWS, span = span_count[own], first = span_first[own];
    // An idle warp helps to fetch and computes nothing.
    bool idle = head_in_group >= group || begin >= span || begin >= WARPS / heads_here * ROWS;
    if (idle) head_in_group = begin = 0;
    int head = kv_head * group + head_in_group;
    int token0 = first + begin, count = min(ROWS, span - begin);
    int position0 = positions[token0];
    int furthest = positions[first] + span - 1;
    const int* table = pages + sequence[token0] * pages_per_sequence;

    Rows rows;
    int token[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
        int i = min(g + 8 * r, count - 1);
        token[r] = token0 + i;
        rows.position[r] = position0 + i;
        int64 vector = int64(token[r]) * n_heads + head;
        rows.dq[r] = dq_all[vector];
#pragma unroll
        for (int step = 0; step < STEPS; step++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const short* from = q_int + vector * cache.padded + 32 * step + 16 * half + 4 * t;
                short4 v = *reinterpret_cast<const short4*>(from);
                rows.q[0][step][2 * half + r] = pack_high(v.x, v.y, v.z, v.w);
                rows.q[1][step][2 * half + r] = pack_bytes(v.x, v.y, v.z, v.w);
            }
    }

    // The first tile is merged like the others: -0 times its factor is what changes no value.
    for (int r = 0; r < 2; r++) rows.m[r] = isobit::from_bits(0xff800000u), rows.l[r] = -0.0f;
    for (int c = 0; c < CHANNEL_COLUMNS; c++)
        for (int i = 0; i < 4; i++) rows.o[c][i] = -0.0f;
    int tile_count = furthest / KV_PAGE + 1;
    auto fetch_stage = [&](int n) {
        for (int i = n; i < min(n + STAGE, tile_count); i++)
            fetch(tiles[i % (2 * STAGE)], cache, table[i], kv_head);
        commit_copies();
    };
    fetch_stage(0);
    for (int n = 0; n < tile_count; n++) {
        if (n % STAGE == 0) {
            if (n) __syncthreads();
            fetch_stage(n + STAGE);
            wait_copies<1>();
            __syncthreads();
        }
        const KeyTile& key_tile = tiles[n % (2 * STAGE)];
        if (!idle && position0 >= n * KV_PAGE + KV_PAGE - 1)
            add_tile<true>(key_tile, n, rows);
        else if (!idle && position0 + count - 1 >= n * KV_PAGE)
            add_tile<false>(key_tile, n, rows);
    }
    if (idle) return;
    Mirrors mirrors(exchanges);
#pragma unroll
    for (int r = 0; r < 2; r++) {
        if (g + 8 * r >= count) continue;
        float scale = div(1.0f, rows.l[r]);
#ifdef MIRRORED  // registers are scarce, and which of these takes fewer is the compiler's whim
        int64 row = token0 + g + 8 * r;
#else
        int64 row = token[r];
#endif
        float* to = out + (row * OUT_HEADS + head) * HEAD + 2 * t;
#pragma unroll
        for (int c = 0; c < CHANNEL_COLUMNS; c++)
            mirrors.store(reinterpret_cast<float2*>(to + 8 * c),
                          make_float2(mul(rows.o[c][2 * r], scale), mul(rows.o[c][2 * r + 1], scale)));
    }
}
