// A decode step: attention's tiles merged, when they are many (docs/numerics.md, section 6).
#include "merge.cuh"

// Many tiles merged: 32 columns a block (blockIdx.x), 256 tiles at a time. All that tiles can do side by
// side comes first: their factors from a running maximum, and their outputs times these. What is left
// is one multiplication and one addition a tile, in order: warp 0 adds outputs, warp 1 their sums.
constexpr int AHEAD = 8;  // tiles that are read while others are added
struct MergeShared {
    float a[THREADS], b[THREADS], l[THREADS], top[THREADS / WARP], sum;
    float v[THREADS][WARP];
};

// r becomes r a[i] + v[i] for i = first … n-1; values of v lie `stride` apart.
DEV float in_order(float r, const float* a, const float* v, int stride, int first, int n) {
    int i = first;
    for (; i + AHEAD <= n; i += AHEAD) {
        float factors[AHEAD], values[AHEAD];
#pragma unroll
        for (int j = 0; j < AHEAD; j++) factors[j] = a[i + j], values[j] = v[(i + j) * stride];
#pragma unroll
        for (int j = 0; j < AHEAD; j++) r = add(mul(r, factors[j]), values[j]);
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
        float v[WARP];  // of tiles warp_id() + WARPS i
#pragma unroll
        for (int i = 0; i < WARP; i++) {
            int tile = warp_id() + WARPS * i;
            if (tile < n)
                v[i] = out[from.index(head, first + tile) * HEAD_DIM + column % HEAD_DIM + lane_id()];
        }
        float2 mine = t < n ? max_and_sum[from.index(head, first + t)] : make_float2(lowest, 0.0f);
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
        if (t < n) {
            float b = isobit::exp(sub(mine.x, top));  // of the first tile: 1
            sh->a[t] = isobit::exp(sub(before, top));
            sh->b[t] = b;
            sh->l[t] = mul(mine.y, b);
        }
        for (int w = 0; w < WARPS; w++) m = fmaxf(m, sh->top[w]);
        __syncthreads();
#pragma unroll
        for (int i = 0; i < WARP; i++) {
            int tile = warp_id() + WARPS * i;
            if (tile < n) sh->v[tile][lane_id()] = mul(v[i], sh->b[tile]);
        }
        __syncthreads();
        int begin = first == 0;  // the first tile is where the sums start
        if (warp_id() == 0) {
            if (begin) r = sh->v[0][lane_id()];
            r = in_order(r, sh->a, &sh->v[0][lane_id()], WARP, begin, n);
        } else if (warp_id() == 1) {
            if (begin) r = sh->l[0];
            r = in_order(r, sh->a, sh->l, 1, begin, n);
        }
        __syncthreads();
    }
    if (warp_id() == 1 && lane_id() == 0) sh->sum = r;
    __syncthreads();
    if (warp_id() == 0) result[column + lane_id()] = mul(r, div(1.0f, sh->sum));
}
