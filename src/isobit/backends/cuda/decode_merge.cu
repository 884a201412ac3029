// A decode step: attention's tiles merged, when they are many (docs/numerics.md, section 6).
#include "merge.cuh"

// Many tiles merged: 32 columns a block (blockIdx.x), 256 tiles at a time. All that tiles can do side by
// side comes first: their factors from a running maximum, and their outputs times these. What is left
// is one multiplication and one addition a tile, in order: warp 0 adds outputs, warp 1 their sums, while
// the other warps bring the next PART tiles.
constexpr int PART = 64;  // tiles
constexpr int AHEAD = 8;  // tiles that are read while others are added
struct MergeShared {
    float a[THREADS], b[THREADS], l[THREADS], top[THREADS / WARP], sum;
    uint32 scaled[THREADS / WARP];  // a bit a tile: a is not 1, the maximum has grown
    float v[THREADS][WARP];
};

// r becomes r a[i] + v[i] for i = first … n-1; values of v lie `stride` apart.
DEV float in_order(float r, const float* a, const uint32* scaled, const float* v, int stride, int first,
                   int n) {
    int i = first;
    for (; i < n && i % AHEAD; i++) r = add(mul(r, a[i]), v[i * stride]);
    for (; i + AHEAD <= n; i += AHEAD) {
        float values[AHEAD];
#pragma unroll
        for (int j = 0; j < AHEAD; j++) values[j] = v[(i + j) * stride];
        if (scaled[i / WARP] >> i % WARP & (1u << AHEAD) - 1) {
#pragma unroll
            for (int j = 0; j < AHEAD; j++) r = add(mul(r, a[i + j]), values[j]);
        } else {  // times 1 changes no bit
#pragma unroll
            for (int j = 0; j < AHEAD; j++) r = add(r, values[j]);
        }
    }
    for (; i < n; i++) r = add(mul(r, a[i]), v[i * stride]);
    return r;
}
KERNEL(THREADS) decode_merge(const Step* step, const float2* max_and_sum, const float* out,
                             int most_tiles, float* result) {
    mark(7, 0);
    DYNAMIC_SHARED(MergeShared, sh);
    constexpr int WARPS = THREADS / WARP;
    int column = blockIdx.x * WARP, head = column / HEAD_DIM, tiles = step->position / TILE + 1;
    TileResults from = {max_and_sum, out, most_tiles, tiles};
    const float lowest = isobit::from_bits(0xff800000u);
    float r = 0.0f, m = lowest;  // m: the maximum of all tiles so far
    let_next_start();
    wait_for_previous();
    mark(7, 1);
    for (int first = 0; first < tiles; first += THREADS) {
        int n = min(THREADS, tiles - first), t = threadIdx.x;
        float2 mine = t < n ? max_and_sum[from.index(head, first + t)] : make_float2(lowest, 0.0f);
        float v[WARP];  // of tiles warp_id() + WARPS i
#pragma unroll
        for (int i = 0; i < WARP; i++) {
            int tile = warp_id() + WARPS * i;
            if (tile < n)
                v[i] = out[from.index(head, first + tile) * HEAD_DIM + column % HEAD_DIM + lane_id()];
        }
        float top = mine.x;  // becomes the running maximum up to and with this tile
        for (int d = 1; d < WARP; d *= 2) {
            float other = shuffle(top, lane_id() - d);
            if (lane_id() >= d) top = fmaxf(top, other);
        }
        float before = shuffle(top, lane_id() - 1);
        if (lane_id() == 0) before = lowest;
        if (lane_id() == WARP - 1) sh->top[warp_id()] = top;
        __syncthreads();
        float ahead = m;
        for (int w = 0; w < warp_id(); w++) ahead = fmaxf(ahead, sh->top[w]);
        top = fmaxf(top, ahead);
        before = fmaxf(before, ahead);
        float b = isobit::exp(sub(mine.x, top)), a = isobit::exp(sub(before, top));
        uint32 scaled = __ballot_sync(~0u, t < n && a != 1.0f);
        if (lane_id() == 0) sh->scaled[warp_id()] = scaled;
        if (t < n) {
            sh->a[t] = a;
            sh->b[t] = b;  // of the first tile: 1
            sh->l[t] = mul(mine.y, b);
        }
        for (int w = 0; w < WARPS; w++) m = fmaxf(m, sh->top[w]);
        __syncthreads();
#pragma unroll
        for (int part = 0; part <= THREADS / PART; part++) {
            int done = max(PART * (part - 1), int(first == 0)), upto = min(PART * part, n);
            if (part && warp_id() < 2) {
                if (part == 1 && first == 0) r = warp_id() ? sh->l[0] : sh->v[0][lane_id()];
                const float* values = warp_id() ? sh->l : &sh->v[0][lane_id()];
                r = in_order(r, sh->a, sh->scaled, values, warp_id() ? 1 : WARP, done, upto);
            }
#pragma unroll
            for (int i = PART / WARPS * part; i < PART / WARPS * (part + 1) && i < WARP; i++) {
                int tile = warp_id() + WARPS * i;
                if (tile < n) sh->v[tile][lane_id()] = mul(v[i], sh->b[tile]);
            }
            __syncthreads();
        }
    }
    if (warp_id() == 1 && lane_id() == 0) sh->sum = r;
    __syncthreads();
    if (warp_id() == 0) result[column + lane_id()] = mul(r, div(1.0f, sh->sum));
}
