// The paged fixed-point KV cache of a layer.
//
// A page holds, for each key-value head, K as two planes [plane][64 positions][padded] and V as two
// planes transposed, [plane][padded][64 positions]; `padded` is head_dim rounded up to 16, the rest
// zeros. Scales are apart: [page][head][64] floats for K and V.
#pragma once
#include "common.cuh"

struct Cache {
    int8* k;
    int8* v;
    float* dk;
    float* dv;
    int heads, padded;

    DEV int8* keys(int page, int head, int plane) const {
        return k + ((int64(page) * heads + head) * 2 + plane) * TILE * padded;
    }
    DEV int8* values(int page, int head, int plane) const {
        return v + ((int64(page) * heads + head) * 2 + plane) * TILE * padded;
    }
    DEV int64 scales(int page, int head) const { return (int64(page) * heads + head) * TILE; }
};
