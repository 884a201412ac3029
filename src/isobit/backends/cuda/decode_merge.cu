// A decode step: attention's tiles merged, when they are many (docs/numerics.md, section 6).
#include "merge.cuh"
#include "copy.cuh"

// Many tiles merged: 32 columns a block (blockIdx.x), 512 tiles at a time. All that tiles can do side by
// side comes first: their factors from a running maximum, and their outputs times these. What is left
// is one multiplication and one addition a tile, in order, of a column's outputs and of their sums.
constexpr int MOST = 512;
struct MergeShared {
    __align__(16) float v[MOST][WARP];
    __align__(16) float a[MOST], b[MOST], l[MOST];
    float top[MOST / WARP];
};

// r a[i] + v[i] and l a[i] + sh->l[i] become r and l, for i = first … n-1; v: a column.
DEV void in_order(float& r, float& l, const MergeShared* sh, const float* v, int first, int n) {
    constexpr int STEP = 4;
    float next[STEP];
    float4 next_a, next_l;
    auto read = [&](int i) {
        next_a = *reinterpret_cast<const float4*>(sh->a + i);
        next_l = *reinterpret_cast<const float4*>(sh->l + i);
#pragma unroll
        for (int j = 0; j < STEP; j++) next[j] = v[(i + j) * WARP];
    };
    auto one = [&](float v, float a, float sum) {
        r = add(mul(r, a), v);
        l = add(mul(l, a), sum);
    };
    int i = first;
    for (; i < n && i % STEP; i++) one(v[i * WARP], sh->a[i], sh->l[i]);
    if (i + STEP <= n) read(i);
#pragma unroll 2
    for (; i + STEP <= n; i += STEP) {
        float4 a = next_a, sum = next_l;
        float v0 = next[0], v1 = next[1], v2 = next[2], v3 = next[3];
        read(min(i + STEP, MOST - STEP));  // on its way while these are added
        one(v0, a.x, sum.x);
        one(v1, a.y, sum.y);
        one(v2, a.z, sum.z);
        one(v3, a.w, sum.w);
    }
    for (; i < n; i++) one(v[i * WARP], sh->a[i], sh->l[i]);
}
KERNEL(512) decode_merge(const Step* step, const float2* max_and_sum, const float* out,
                             int most_tiles, float* result) {
    mark(7, 0);
    DYNAMIC_SHARED(MergeShared, sh);
    constexpr int WARPS = MOST / WARP;
    int column = blockIdx.x * WARP, head = column / HEAD_DIM, tiles = step->position / TILE + 1;
    TileResults from = {max_and_sum, out, most_tiles, tiles};
    const float lowest = isobit::from_bits(0xff800000u);
    float r = 0.0f, l = 0.0f, m = lowest;  // m: the maximum of all tiles so far
    let_next_start();
    wait_for_previous();
    mark(7, 1);
    for (int first = 0; first < tiles; first += MOST) {
        int n = min(MOST, tiles - first), t = threadIdx.x;
#pragma unroll 1
        for (int i = threadIdx.x; i < 8 * n; i += MOST)  // 16 bytes of tile i / 8
            copy_async(&sh->v[i / 8][i % 8 * 4], out + from.index(head, first + i / 8) * HEAD_DIM +
                                                     column % HEAD_DIM + i % 8 * 4);
        commit_copies();
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
        float a = isobit::exp(sub(before, top)), b = isobit::exp(sub(mine.x, top));
        sh->a[t] = a;
        sh->b[t] = b;  // of the first tile: 1
        sh->l[t] = mul(mine.y, b);
        for (int w = 0; w < WARPS; w++) m = fmaxf(m, sh->top[w]);
        wait_copies<0>();
        __syncthreads();
        for (int tile = warp_id(); tile < n; tile += WARPS)
            sh->v[tile][lane_id()] = mul(sh->v[tile][lane_id()], sh->b[tile]);
        __syncthreads();
        mark(7, 2);
        if (warp_id() == 0) {
            const float* v = &sh->v[0][lane_id()];
            if (first == 0) r = v[0], l = sh->l[0];  // where the sums start
            in_order(r, l, sh, v, first == 0, n);
        }
        mark(7, 3);
        __syncthreads();
    }
    if (warp_id() == 0) result[column + lane_id()] = mul(r, div(1.0f, l));
    mark(7, 5);
}
