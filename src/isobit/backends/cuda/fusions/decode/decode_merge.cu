// A decode step: attention's tiles merged, when they are many (docs/numerics.md, section 6).
#include "merge.cuh"
#include "copy.cuh"
#include "exchange.cuh"

// Many tiles merged: 32 columns a block (blockIdx.x), 512 tiles at a time. All that tiles can do side by
// side comes first: their factors from a running maximum, and their outputs times these. What is left
// is one multiplication and one addition a tile, in order: warp 0 adds outputs, warp 1 their sums.
constexpr int MOST = 512, STRIDE = WARP + 4;
struct MergeShared {
    __align__(16) float v[MOST][STRIDE];  // of a tile: its columns, and its sum
    __align__(16) float a[MOST], b[MOST];
    float top[MOST / WARP];
};

// r a[i] + v[i] becomes r for i = 0 … n-1; v: a column. What step i + AHEAD needs is read in the shadow
// of step i, also behind the last, where memory is the struct's own.
DEV float in_order(float r, const float* a, const float* v, int n) {
    constexpr int AHEAD = 8;
    int i = 0;
    float value[AHEAD], factor[AHEAD];
#pragma unroll
    for (int j = 0; j < AHEAD; j++) value[j] = v[(i + j) * STRIDE], factor[j] = a[i + j];
#pragma unroll 1
    for (; i + AHEAD <= n; i += AHEAD)
#pragma unroll
        for (int j = 0; j < AHEAD; j++) {
            r = add(mul(r, factor[j]), value[j]);
            value[j] = v[(i + j + AHEAD) * STRIDE];
            factor[j] = a[i + j + AHEAD];
        }
#pragma unroll
    for (int j = 0; j < AHEAD - 1; j++)
        if (i + j < n) r = add(mul(r, factor[j]), value[j]);
    return r;
}

KERNEL(512) decode_merge(const int* positions, const float2* max_and_sum, const float* out,
                         int most_tiles, float* result, const uint64* exchanges, int sent) {
    static_assert(MOST == 512 && sizeof(MergeShared) == 4 * (512 * 38 + 16), "decode_launches.py knows both");
    mark(7, 0);
    DYNAMIC_SHARED(MergeShared, sh);
    constexpr int WARPS = MOST / WARP;
    int column = blockIdx.x * WARP, head = column / HEAD_DIM, row = blockIdx.y;
    int tiles = positions[row] / KV_PAGE + 1;
    max_and_sum += row * int64(HEADS) * most_tiles;
    out += row * int64(HEADS) * most_tiles * HEAD_DIM;
    result += row * HEADS * HEAD_DIM;
    TileResults from = {max_and_sum, out, most_tiles, tiles};
    const float lowest = isobit::from_bits(0xff800000u);
    float m = lowest;  // of all tiles so far
    float r = -0.0f;   // the first tile's factor is 0: -0 * 0 + v is v, whatever its sign
    Exchange<SentCut> to(exchanges, sent);
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
        float tops = lane_id() < WARPS ? sh->top[lane_id()] : lowest;
        float ahead = fmaxf(m, warp_max(lane_id() < warp_id() ? tops : lowest));
        top = fmaxf(top, ahead);
        before = fmaxf(before, ahead);
        float a = isobit::exp(sub(before, top)), b = isobit::exp(sub(mine.x, top));
        sh->a[t] = a;
        sh->b[t] = b;  // of the first tile: 1
        sh->v[t][WARP] = mul(mine.y, b);
        m = fmaxf(m, warp_max(tops));
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
            r = in_order(r, sh->a, v, n);
        }
        mark(7, 3);
        __syncthreads();
    }
    if (warp_id() == 1 && lane_id() == 0) sh->b[0] = r;
    __syncthreads();
    if (warp_id() == 0) {
        float value = mul(r, div(1.0f, sh->b[0]));
        result[column + lane_id()] = value;
        to.send(to.at(row, 0) + to.first + column + lane_id(), value);
    }
    mark(7, 5);
}
