// Sums over rows of logits: weights of section 10 of docs/numerics.md, in blocks of 256 threads.
#pragma once
#include "argmax.cuh"

constexpr int BLOCK = 256, WARPS = BLOCK / WARP;
constexpr int EACH = 8;              // values of a thread
constexpr int PIECE = BLOCK * EACH;  // of a block; also known to sampler.py
constexpr uint64 BROKEN = ~0ull;     // the key of a logit that is not finite
DEV bool chooses(uint64 key) { return key != BROKEN && key; }  // 0: of no logit at all

struct Sums {
    uint64 weight, count;
};
DEV Sums plus(Sums a, Sums b) { return {a.weight + b.weight, a.count + b.count}; }

// Every thread gets the sum. buffer: shared, one a warp.
DEV Sums block_sum(Sums v, Sums* buffer) {
    for (int n = 16; n; n /= 2) v = plus(v, {shuffle_xor(v.weight, n), shuffle_xor(v.count, n)});
    if (lane_id() == 0) buffer[warp_id()] = v;
    __syncthreads();
    v = buffer[0];
    for (int w = 1; w < WARPS; w++) v = plus(v, buffer[w]);
    return v;
}

// What the threads before this one have. buffer: shared, one a warp; free again after the next barrier.
DEV Sums block_before(Sums v, Sums* buffer) {
    Sums upto = v;
    for (int n = 1; n < WARP; n *= 2) {
        Sums other = {shuffle(upto.weight, lane_id() - n), shuffle(upto.count, lane_id() - n)};
        if (lane_id() >= n) upto = plus(upto, other);
    }
    if (lane_id() == WARP - 1) buffer[warp_id()] = upto;
    __syncthreads();
    Sums before = {upto.weight - v.weight, upto.count - v.count};
    for (int w = 0; w < warp_id(); w++) before = plus(before, buffer[w]);
    return before;
}

// The logarithm of a sum of weights.
DEV float log_total(uint64 sum) { return isobit::log(mul(float(sum), 0x1p-40f)); }
