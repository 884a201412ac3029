// The largest logit, the lower index among equals, as the largest of 64-bit keys.
#pragma once
#include "common.cuh"

// Orders floats as integers, -0 with +0; the index decides among equals.
DEV uint64 rank_key(float v, int index) {
    uint32 b = v == 0.0f ? 0u : bits(v);
    b = b >> 31 ? ~b : b | 0x80000000u;
    return uint64(b) << 32 | (0xffffffffu - uint32(index));
}
DEV float value_of(uint64 key) {
    uint32 b = uint32(key >> 32);
    return isobit::from_bits(b >> 31 ? b & 0x7fffffffu : ~b);
}
DEV int index_of(uint64 key) { return int(0xffffffffu - uint32(key)); }

// The largest key of a block of so many warps; buffer: shared, a word a warp.
template <int WARPS>
DEV uint64 block_best(uint64 key, uint64* buffer) {
    for (int n = 16; n; n /= 2) key = max(key, shuffle_xor(key, n));
    if (lane_id() == 0) buffer[warp_id()] = key;
    __syncthreads();
    for (int w = 0; w < WARPS; w++) key = max(key, buffer[w]);
    return key;
}
