// A decode step: attention's tiles merged, when they are many (docs/numerics.md, section 6).
#include "merge.cuh"

// Many tiles merged: 32 columns a block (blockIdx.x), 256 tiles at a time. All that tiles can do side by
// side comes first: their factors from a running maximum, and their outputs times these. What is left
// is one multiplication and one addition a tile, in order: warp 0 adds outputs, warp 1 their sums.
constexpr int STRIDE = THREADS + 4;  // lanes that read four tiles of their columns meet no bank twice
struct MergeShared {
    __align__(16) float a[THREADS], b[THREADS], l[THREADS];
    __align__(16) float v[WARP][STRIDE];  // by column
    float top[THREADS / WARP], sum;
    uint32 scaled[THREADS / WARP];  // a bit a tile: a is not 1, the maximum has grown
};

DEV void load_four(const float* from, float (&to)[4]) {
    float4 v = *reinterpret_cast<const float4*>(from);
    to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
}

// r becomes r a[i] + v[i] for i = 0 … n-1, or, from the start of the sums, v[0] and then so on.
DEV float in_order(float r, const float* a, const uint32* scaled, const float* v, int n, bool start) {
    float next[8];
    load_four(v, (float(&)[4])next[0]);
    load_four(v + 4, (float(&)[4])next[4]);
#pragma unroll 1
    for (int i = 0; i < n; i += 8) {
        float now[8];
#pragma unroll
        for (int j = 0; j < 8; j++) now[j] = next[j];
        if (i + 8 < n) {  // on its way while these are added
            load_four(v + i + 8, (float(&)[4])next[0]);
            load_four(v + i + 12, (float(&)[4])next[4]);
        }
        if (i + 8 > n || scaled[i / WARP] >> i % WARP & 255) {
#pragma unroll
            for (int j = 0; j < 8; j++)
                if (i + j < n) r = start && i + j == 0 ? now[0] : add(mul(r, a[i + j]), now[j]);
        } else {  // times 1 changes no bit
#pragma unroll
            for (int j = 0; j < 8; j++) r = add(r, now[j]);
        }
    }
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
        float v[WARP];  // four tiles from 4 (warp + WARPS i) on at v[4i]
#pragma unroll
        for (int i = 0; i < WARP; i++) {
            int tile = 4 * (warp_id() + WARPS * (i / 4)) + i % 4;
            v[i] = 0.0f;
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
        float a = isobit::exp(sub(before, top)), b = isobit::exp(sub(mine.x, top));
        uint32 scaled = __ballot_sync(~0u, a != 1.0f);
        if (lane_id() == 0) sh->scaled[warp_id()] = scaled;
        sh->a[t] = a;
        sh->b[t] = b;  // of the first tile: 1
        sh->l[t] = mul(mine.y, b);
        for (int w = 0; w < WARPS; w++) m = fmaxf(m, sh->top[w]);
        __syncthreads();
#pragma unroll
        for (int i = 0; i < WARP; i += 4) {
            int tile = 4 * (warp_id() + WARPS * (i / 4));
            float factor[4];
            load_four(sh->b + tile, factor);
            *reinterpret_cast<float4*>(&sh->v[lane_id()][tile]) =
                make_float4(mul(v[i], factor[0]), mul(v[i + 1], factor[1]),
                            mul(v[i + 2], factor[2]), mul(v[i + 3], factor[3]));
        }
        __syncthreads();
        if (warp_id() < 2)
            r = in_order(r, sh->a, sh->scaled, warp_id() ? sh->l : sh->v[lane_id()], n, first == 0);
        __syncthreads();
    }
    if (warp_id() == 1 && lane_id() == 0) sh->sum = r;
    __syncthreads();
    if (warp_id() == 0) result[column + lane_id()] = mul(r, div(1.0f, sh->sum));
}
