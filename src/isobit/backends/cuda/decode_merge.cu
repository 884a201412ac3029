// A decode step: attention's tiles merged, when they are many (docs/numerics.md, section 6).
#include "merge.cuh"
#include "copy.cuh"

// Many tiles merged: 32 columns a block (blockIdx.x), 512 tiles at a time. All that tiles can do side by
// side comes first: their factors from a running maximum, and their outputs times these. What is left
// is one multiplication and one addition a tile, in order: warp 0 adds outputs, warp 1 their sums.
constexpr int MOST = 512, STRIDE = WARP + 4;
struct MergeShared {
    __align__(16) float v[MOST][STRIDE];  // of a tile: its columns, and its sum
    __align__(16) float a[MOST], b[MOST];
    float top[MOST / WARP];
};

// r a[i] + v[i] becomes r for i = first … n-1; v: a column.
DEV float in_order(float r, const float* a, const float* v, int first, int n) {
    constexpr int STEP = 8;
    float next[STEP], next_a[STEP];
    auto read = [&](int i) {
#pragma unroll
        for (int j = 0; j < STEP; j++) next[j] = v[(i + j) * STRIDE];
#pragma unroll
        for (int j = 0; j < STEP; j += 4) {
            float4 four = *reinterpret_cast<const float4*>(a + i + j);
            next_a[j] = four.x, next_a[j + 1] = four.y, next_a[j + 2] = four.z, next_a[j + 3] = four.w;
        }
    };
    int i = first;
    for (; i < n && i % STEP; i++) r = add(mul(r, a[i]), v[i * STRIDE]);
    if (i + STEP <= n) read(i);
#pragma unroll 2
    for (; i + STEP <= n; i += STEP) {
        float now[STEP], now_a[STEP];
#pragma unroll
        for (int j = 0; j < STEP; j++) now[j] = next[j], now_a[j] = next_a[j];
        read(min(i + STEP, MOST - STEP));  // on its way while these are added
#pragma unroll
        for (int j = 0; j < STEP; j++) r = add(mul(r, now_a[j]), now[j]);
    }
    for (; i < n; i++) r = add(mul(r, a[i]), v[i * STRIDE]);
    return r;
}
KERNEL(512) decode_merge(const Step* step, const float2* max_and_sum, const float* out,
                             int most_tiles, float* result) {
    mark(7, 0);
    DYNAMIC_SHARED(MergeShared, sh);
    constexpr int WARPS = MOST / WARP;
    int column = blockIdx.x * WARP, head = column / HEAD_DIM, tiles = step->position / TILE + 1;
    TileResults from = {max_and_sum, out, most_tiles, tiles};
    const float lowest = isobit::from_bits(0xff800000u);
    float r = 0.0f, m = lowest;  // m: the maximum of all tiles so far
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
        sh->v[t][WARP] = mul(mine.y, b);
        for (int w = 0; w < WARPS; w++) m = fmaxf(m, sh->top[w]);
        wait_copies<0>();
        __syncthreads();
#pragma unroll 1
        for (int i = threadIdx.x; i < 8 * n; i += MOST) {
            float4* four = reinterpret_cast<float4*>(&sh->v[i / 8][i % 8 * 4]);
            float4 v = *four;
            float b = sh->b[i / 8];
            *four = make_float4(mul(v.x, b), mul(v.y, b), mul(v.z, b), mul(v.w, b));
        }
        __syncthreads();
        mark(7, 2);
        if (warp_id() < 2) {  // a column a lane, or, by warp 1, the sums
            const float* v = &sh->v[0][warp_id() ? WARP : lane_id()];
            if (first == 0) r = v[0];  // where the sums start
            r = in_order(r, sh->a, v, first == 0, n);
        }
        mark(7, 3);
        __syncthreads();
    }
    if (warp_id() == 1 && lane_id() == 0) sh->b[0] = r;
    __syncthreads();
    if (warp_id() == 0) result[column + lane_id()] = mul(r, div(1.0f, sh->b[0]));
    mark(7, 5);
}
