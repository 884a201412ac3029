// Head vectors in the form in which attention reads them (docs/numerics.md, section 6): queries to
// integers and scales, keys and values to the paged cache. PADDED_HEAD: places for the values of a head
// vector, a multiple of 32.
#include "cache.cuh"
#include "views.cuh"

enum Kind { QUERY, KEY, VALUE };

// A head vector of n values a warp.
KERNEL(THREADS) append(int kind, const float* x, int64 stride, int step, int heads, int n, int count,
                       const int* positions, const int* sequence, const int* pages,
                       int pages_per_sequence, float scale, short* q_int, float* dq, int8* k,
                       int8* v, float* dk, float* dv, int kv_heads, int padded) {
    begin();
    constexpr int PARTS = PADDED_HEAD / WARP;
    Cache cache = {k, v, dk, dv, kv_heads, padded};
    int index = blockIdx.x * (THREADS / WARP) + warp_id(), token = index / heads, head = index % heads;
    if (index >= count) return;
    const float* from = View{x, stride, step, heads}.vector(index);
    float y[PARTS];
    uint32 amax = 0;
#pragma unroll
    for (int part = 0; part < PARTS; part++) {
        int i = lane_id() + WARP * part;
        y[part] = i < n ? from[i] : 0.0f;
        amax = max(amax, magnitude(y[part]));
    }
    isobit::BlockScale block = isobit::block_scale(warp_max(amax), 2);
    int position = positions[token], slot = position % KV_PAGE;
    int page = kind == QUERY ? 0 : pages[sequence[token] * pages_per_sequence + position / KV_PAGE];
#pragma unroll
    for (int part = 0; part < PARTS; part++) {
        int i = lane_id() + WARP * part;
        if (i >= padded) continue;
        int q = quantised(y[part], block);  // 0 past n
        int8 planes[2] = {int8(isobit::high_plane(q)), int8(isobit::low_plane(q))};
        if (kind == QUERY) q_int[int64(index) * padded + i] = short(q);
        for (int p = 0; p < 2; p++) {
            if (kind == KEY) cache.keys(page, head, p)[slot * padded + i] = planes[p];
            if (kind == VALUE) cache.values(page, head, p)[i * KV_PAGE + value_slot(slot)] = planes[p];
        }
    }
    if (lane_id()) return;
    if (kind == QUERY) dq[index] = mul(block.d, scale);
    if (kind == KEY) cache.dk[cache.scales(page, head) + slot] = block.d;
    if (kind == VALUE) cache.dv[cache.scales(page, head) + slot] = block.d;
}
