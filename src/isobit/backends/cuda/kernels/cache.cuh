// The paged fixed-point KV cache of one layer (docs/numerics.md, section 6).
#pragma once
#include "common.cuh"

// A page holds, for each key-value head, K as two planes [plane][64 positions][padded] and V as two
// planes transposed, [plane][padded][64 slots], a position's slot being value_slot's; `padded` is
// head_dim rounded up to 16, the rest zeros. Scales are apart: [page][head][64] floats for K and V.
struct Cache {
    int8* k;
    int8* v;
    float* dk;
    float* dv;
    int heads, padded;

    DEV int8* keys(int page, int head, int plane) const {
        return k + ((int64(page) * heads + head) * 2 + plane) * KV_PAGE * padded;
    }
    DEV int8* values(int page, int head, int plane) const {
        return v + ((int64(page) * heads + head) * 2 + plane) * KV_PAGE * padded;
    }
    DEV int64 scales(int page, int head) const { return (int64(page) * heads + head) * KV_PAGE; }
};

// Where position j of a tile lies among V's 64: in each 16, in the order 0 1 8 9 2 3 10 11 4 5 12 13
// 6 7 14 15, so that the keys which one lane holds of two columns of scores are four bytes in a row.
DEV int value_slot(int j) {
    return (j & ~15) | (j & 6) << 1 | (j & 8) >> 2 | (j & 1);
}
