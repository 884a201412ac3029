// Attention over the paged fixed-point cache (docs/numerics.md, section 6).
// PADDED_HEAD: places for the values of a head vector, head_dim rounded up to PASS.
#include "cache.cuh"
#include "mirrors.cuh"

constexpr int PASS = THREADS / 2;  // columns of v that a block takes at once, two threads each
constexpr int PASSES = PADDED_HEAD / PASS;
static_assert(PADDED_HEAD % PASS == 0, "columns past the last whole pass would be left out");

// Sixteen bytes of k times sixteen 16-bit q.
DEV int dot16(const int4* q, int4 k, int sum) {
    int4 a = q[0], b = q[1];
    sum = dp2a_hi(a.y, k.x, dp2a_lo(a.x, k.x, sum));
    sum = dp2a_hi(a.w, k.y, dp2a_lo(a.z, k.y, sum));
    sum = dp2a_hi(b.y, k.z, dp2a_lo(b.x, k.z, sum));
    return dp2a_hi(b.w, k.w, dp2a_lo(b.z, k.w, sum));
}

struct TileShared {
    float s[KV_PAGE];
    __align__(16) short weights[KV_PAGE];
    float m, l, g;
};

// Which keys a token sees: all up to its own, or with a window so many, its own among them.
struct Seen {
    int begin, end;

    DEV Seen(int position, int window)
        : begin(window && position >= window ? position + 1 - window : 0), end(position + 1) {}
    DEV int first_tile() const { return begin / KV_PAGE; }
    // Of tile t, from a key on and up to one.
    DEV int from(int t) const { return max(begin - t * KV_PAGE, 0); }
    DEV int upto(int t) const { return min(end - t * KV_PAGE, KV_PAGE); }
};

// A tile's keys from … seen - 1 for one query head: maximum, sum and, in each thread, the outputs of its
// columns (thread 2c + h holds column c of every pass; both of a pair get it).
DEV void attention_tile(const Cache& cache, int page, int head, int from, int seen, const int4* q, float dq,
                        TileShared& shared, float (&o)[PASSES]) {
    const int8* keys[2] = {cache.keys(page, head, 0), cache.keys(page, head, 1)};
    int key = threadIdx.x / 4, part = threadIdx.x % 4, sum[2] = {0, 0};
    for (int c = part; c < cache.padded / 16; c += 4)
        for (int p = 0; p < 2; p++) {
            const int8* row = keys[p] + key * cache.padded + 16 * c;
            sum[p] = dot16(q + 2 * c, *reinterpret_cast<const int4*>(row), sum[p]);
        }
    for (int n = 1; n < 4; n *= 2)
        for (int p = 0; p < 2; p++) sum[p] += shuffle_xor(sum[p], n);
    const float* dk = cache.dk + cache.scales(page, head);
    const float* dv = cache.dv + cache.scales(page, head);
    if (part == 0 && key < seen)
        shared.s[key] = mul(mul(dq, dk[key]), combine_planes<2>(sum[0], sum[1]));
    __syncthreads();
    if (warp_id() == 0) {
        const float lowest = isobit::from_bits(0xff800000u);
        float s[2], p[2], weighted[2];
        for (int i = 0; i < 2; i++) {
            int j = lane_id() + WARP * i;
            s[i] = j >= from && j < seen ? shared.s[j] : lowest;
        }
        float m = warp_max(fmaxf(s[0], s[1]));
        uint32 amax = 0;
        for (int i = 0; i < 2; i++) {
            int j = lane_id() + WARP * i;
            p[i] = isobit::exp(sub(s[i], m));
            bool sees = j >= from && j < seen;
            p[i] = sees ? p[i] : 0.0f;
            weighted[i] = sees ? mul(p[i], dv[j]) : 0.0f;
            amax = max(amax, magnitude(weighted[i]));
        }
        isobit::BlockScale block = isobit::block_scale(warp_max(amax), 2);
        for (int i = 0; i < 2; i++)
            shared.weights[value_slot(lane_id() + WARP * i)] = short(quantised(weighted[i], block));
        float l = warp_tree(add(p[0], p[1]));
        if (lane_id() == 0) {
            shared.m = m;
            shared.l = l;
            shared.g = block.d;
        }
    }
    __syncthreads();
    const int8* values[2] = {cache.values(page, head, 0), cache.values(page, head, 1)};
    int half = threadIdx.x % 2;
    const int4* weights = reinterpret_cast<const int4*>(shared.weights) + 4 * half;
    for (int n = 0; n < PASSES; n++) {
        int column = threadIdx.x / 2 + PASS * n, dot[2] = {0, 0};
        if (column < cache.padded)
            for (int p = 0; p < 2; p++) {
                const int4* v =
                    reinterpret_cast<const int4*>(values[p] + column * KV_PAGE + 32 * half);
                dot[p] = dot16(weights + 2, v[1], dot16(weights, v[0], 0));
            }
        for (int p = 0; p < 2; p++) dot[p] += shuffle_xor(dot[p], 1);
        o[n] = mul(shared.g, combine_planes<2>(dot[0], dot[1]));
    }
}

// The last step of a head with a sink: a key without a value. Returns the factor of what is merged.
DEV float sink_step(float sink, float m, float& l) {
    float top = fmaxf(m, sink), a = isobit::exp(sub(m, top));
    l = add(mul(l, a), isobit::exp(sub(sink, top)));
    return a;
}

// One query head (blockIdx.x) of one token (blockIdx.y), its tiles in turn. window: 0 for none; sinks: a
// number a head, or null. OUT_HEADS: query heads of a row of the output.
#ifndef OUT_HEADS
#define OUT_HEADS n_heads
#endif
KERNEL(THREADS) attention(int head_dim, const short* q_int, const float* dq, const int* positions,
                          const int* sequence, const int* pages, int pages_per_sequence,
                          int n_heads, int8* k, int8* v, float* dk, float* dv, int kv_heads,
                          int padded, int window, const float* sinks, float* out,
                          const uint64* exchanges) {
    Mirrors mirrors(exchanges);
    begin();
    Cache cache = {k, v, dk, dv, kv_heads, padded};
    __shared__ __align__(16) short q[PADDED_HEAD];
    __shared__ TileShared tile;
    int head = blockIdx.x, token = blockIdx.y, kv_head = head / (n_heads / cache.heads);
    int64 vector = int64(token) * n_heads + head;
    for (int i = threadIdx.x; i < cache.padded; i += THREADS)
        q[i] = q_int[vector * cache.padded + i];
    __syncthreads();
    const int* table = pages + sequence[token] * pages_per_sequence;
    Seen seen(positions[token], window);
    float m = 0.0f, l = 0.0f, o[PASSES] = {}, next[PASSES] = {};
    for (int t = seen.first_tile(); t * KV_PAGE < seen.end; t++) {
        attention_tile(cache, table[t], kv_head, seen.from(t), seen.upto(t),
                       reinterpret_cast<const int4*>(q), dq[vector], tile, next);
        bool more = t > seen.first_tile();
        float top = more ? fmaxf(m, tile.m) : tile.m;
        float a = more ? isobit::exp(sub(m, top)) : 0.0f, b = isobit::exp(sub(tile.m, top));
        l = more ? add(mul(l, a), mul(tile.l, b)) : tile.l;
        for (int n = 0; n < PASSES; n++)
            o[n] = more ? add(mul(o[n], a), mul(next[n], b)) : next[n];
        m = top;
        __syncthreads();
    }
    if (sinks) {
        float a = sink_step(sinks[head], m, l);
        for (int n = 0; n < PASSES; n++) o[n] = mul(o[n], a);
    }
    float r = div(1.0f, l);
    for (int n = 0; n < PASSES; n++) {
        int column = threadIdx.x / 2 + PASS * n;
        if (threadIdx.x % 2 == 0 && column < head_dim)
            mirrors.store(out + (int64(token) * OUT_HEADS + head) * head_dim + column, mul(o[n], r));
    }
}

// A step: the tiles of a query head (blockIdx.x) of a token (blockIdx.y) dealt to blocks (blockIdx.z). Of
// each tile [token][head][most_tiles] its maximum and sum, and its outputs.
KERNEL(THREADS) attention_tiles(int head_dim, const short* q_int, const float* dq,
                                const int* positions, const int* sequence, const int* pages,
                                int pages_per_sequence, int n_heads, int8* k, int8* v, float* dk,
                                float* dv, int kv_heads, int padded, int window, int most_tiles,
                                float2* max_and_sum, float* tile_out) {
    begin();
    Cache cache = {k, v, dk, dv, kv_heads, padded};
    __shared__ __align__(16) short q[PADDED_HEAD];
    __shared__ TileShared tile;
    int head = blockIdx.x, token = blockIdx.y, kv_head = head / (n_heads / cache.heads);
    Seen seen(positions[token], window);
    if ((seen.first_tile() + int(blockIdx.z)) * KV_PAGE >= seen.end) return;
    int64 vector = int64(token) * n_heads + head;
    for (int i = threadIdx.x; i < cache.padded; i += THREADS)
        q[i] = q_int[vector * cache.padded + i];
    __syncthreads();
    const int* table = pages + sequence[token] * pages_per_sequence;
    for (int t = seen.first_tile() + blockIdx.z; t * KV_PAGE < seen.end; t += gridDim.z) {
        float o[PASSES] = {};
        attention_tile(cache, table[t], kv_head, seen.from(t), seen.upto(t),
                       reinterpret_cast<const int4*>(q), dq[vector], tile, o);
        int64 at = vector * most_tiles + t;
        if (threadIdx.x == 0) max_and_sum[at] = make_float2(tile.m, tile.l);
        for (int n = 0; n < PASSES; n++) {
            int column = threadIdx.x / 2 + PASS * n;
            if (threadIdx.x % 2 == 0 && column < head_dim) tile_out[at * head_dim + column] = o[n];
        }
        __syncthreads();
    }
}

// The tiles of a query head merged in ascending order, a column a thread.
KERNEL(THREADS) attention_merge(int head_dim, const int* positions, int n_heads, int window,
                                const float* sinks, int most_tiles, const float2* max_and_sum,
                                const float* tile_out, float* out) {
    begin();
    Seen seen(positions[blockIdx.y], window);
    int first = seen.first_tile(), tiles = (seen.end + KV_PAGE - 1) / KV_PAGE;
    int64 vector = int64(blockIdx.y) * n_heads + blockIdx.x;
    max_and_sum += vector * most_tiles;
    tile_out += vector * most_tiles * head_dim;
    for (int column = threadIdx.x; column < head_dim; column += THREADS) {
        float m = max_and_sum[first].x, l = max_and_sum[first].y;
        float o = tile_out[int64(first) * head_dim + column];
#pragma unroll 8
        for (int t = first + 1; t < tiles; t++) {
            float2 next = max_and_sum[t];
            float value = tile_out[int64(t) * head_dim + column], top = fmaxf(m, next.x);
            float a = isobit::exp(sub(m, top)), b = isobit::exp(sub(next.x, top));
            l = add(mul(l, a), mul(next.y, b));
            o = add(mul(o, a), mul(value, b));
            m = top;
        }
        if (sinks) o = mul(o, sink_step(sinks[blockIdx.x], m, l));
        out[vector * head_dim + column] = mul(o, div(1.0f, l));
    }
}
