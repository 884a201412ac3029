// A decode step: attention's tiles merged, when they are many (docs/numerics.md, section 6).
#include "merge.cuh"
#include "copy.cuh"

// Many tiles merged: 32 columns a block (blockIdx.x), 512 tiles at a time. What tiles can do side by side
// comes first: their factors from a running maximum. What is left is one multiplication and one addition
// a tile, in order: warp 0 adds outputs, warp 1 their sums. The code is short because it runs once: every
// line of it has to be fetched, too.
constexpr int MOST = 512;
struct MergeShared {
    __align__(16) float v[MOST][WARP];
    float a[MOST], b[MOST], l[MOST], top[MOST / WARP], sum;
    uint32 scaled[MOST / WARP];  // a bit a tile: a is not 1, the maximum has grown
};

// r becomes r a[i] + v[i] b[i] for i = 0 … n-1; values of v lie `stride` apart. At the start of the sums
// the first value is taken as it is.
DEV float in_order(float r, const MergeShared* sh, const float* v, int stride, int n, bool start) {
    constexpr int STEP = 8;
    float next[STEP], next_a[STEP];
    auto read = [&](int first) {
#pragma unroll
        for (int j = 0; j < STEP; j++) {
            next[j] = mul(v[(first + j) * stride], sh->b[first + j]);
            next_a[j] = sh->a[first + j];
        }
    };
    read(0);
#pragma unroll 1
    for (int i = 0; i < n; i += STEP) {
        float now[STEP], a[STEP];
#pragma unroll
        for (int j = 0; j < STEP; j++) now[j] = next[j], a[j] = next_a[j];
        bool plain = i + STEP <= n && !(sh->scaled[i / WARP] >> i % WARP & (1u << STEP) - 1);
        read(min(i + STEP, MOST - STEP));  // while these are added
        if (plain) {  // times 1 changes no bit
#pragma unroll
            for (int j = 0; j < STEP; j++) r = add(r, now[j]);
        } else {
#pragma unroll
            for (int j = 0; j < STEP; j++)
                if (i + j < n) r = start && i + j == 0 ? now[0] : add(mul(r, a[j]), now[j]);
        }
    }
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
        uint32 scaled = __ballot_sync(~0u, a != 1.0f);
        if (lane_id() == 0) sh->scaled[warp_id()] = scaled;
        sh->a[t] = a;
        sh->b[t] = b;  // of the first tile: 1
        sh->l[t] = mine.y;
        for (int w = 0; w < WARPS; w++) m = fmaxf(m, sh->top[w]);
        wait_copies<0>();
        __syncthreads();
        mark(7, 2);
        if (warp_id() < 2) {
            const float* values = warp_id() ? sh->l : &sh->v[0][lane_id()];
            r = in_order(r, sh, values, warp_id() ? 1 : WARP, n, first == 0);
        }
        mark(7, 3);
        __syncthreads();
    }
    if (warp_id() == 1 && lane_id() == 0) sh->sum = r;
    __syncthreads();
    if (warp_id() == 0) result[column + lane_id()] = mul(r, div(1.0f, sh->sum));
    mark(7, 5);
}
