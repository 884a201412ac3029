// RMS norm (docs/numerics.md, section 5), also of a sum, with the quantisation of what it gives.
// A row of SUPERS superblocks a block: of a superblock a warp holds eight values a lane, from their
// load to the quantised record. A block of many superblocks has fewer warps, each of them for EACH.
#include "common.cuh"

constexpr int WARPS = ROW_THREADS / WARP, EACH = (SUPERS + WARPS - 1) / WARPS;
constexpr int RANKS = 8;  // rows of a weighted sum that are read at once

// ((0 + w_1 * y_1) + w_2 * y_2) + … of eight columns; rows of y are n apart.
DEV void weighted(const float* w, const float* y, int k, int n, float (&sum)[8]) {
#pragma unroll
    for (int i = 0; i < 8; i++) sum[i] = 0.0f;
    for (int first = 0; first < k; first += RANKS) {
        float part[RANKS][8], by[RANKS];
#pragma unroll
        for (int r = 0; r < RANKS; r++) {
            if (first + r < k) {
                by[r] = w[first + r];
                load8(y + int64(first + r) * n, part[r]);
            }
        }
#pragma unroll
        for (int r = 0; r < RANKS; r++)
#pragma unroll
            for (int i = 0; i < 8; i++)
                if (first + r < k) sum[i] = add(sum[i], mul(by[r], part[r][i]));
    }
}

// x += residual, or the weighted sum of k rows of residual if there are weights, or nothing where it is
// null; y = norm of x, out = y quantised. n: a multiple of 8.
KERNEL(ROW_THREADS) norm_quantise(float* x, const float* residual, const float* weights, int k,
                                  const float* norm, float eps, int n, float* y, Act* out) {
    __shared__ float squares[SUPERS][SUPER];
    __shared__ float buffer[SUPER];
    int own[EACH], column[EACH];  // superblocks, and of each the first of eight columns
    float v[EACH][8], scale[EACH][8];
#pragma unroll
    for (int e = 0; e < EACH; e++) {
        own[e] = warp_id() + e * WARPS;
        // Columns behind the last are computed as those are, and not stored.
        column[e] = min(own[e] * SUPER + 8 * lane_id(), n - 8);
        load8(norm + column[e], scale[e]);
    }
#ifndef LATE
    let_next_start();
#endif
    wait_for_previous();
    int64 row = blockIdx.x;
#pragma unroll
    for (int e = 0; e < EACH; e++) {
        load8(x + row * n + column[e], v[e]);
        if (residual) {
            float more[8];
            if (weights)
                weighted(weights + row * k, residual + row * k * n + column[e], k, n, more);
            else
                load8(residual + row * n + column[e], more);
#pragma unroll
            for (int i = 0; i < 8; i++) v[e][i] = add(v[e][i], more[i]);
        }
    }
#ifdef LATE
    let_next_start();
#endif
#pragma unroll
    for (int e = 0; e < EACH; e++) {
        bool there = own[e] * SUPER + 8 * lane_id() < n;
        if (there && residual) store8(x + row * n + column[e], v[e]);
        float square[8];
#pragma unroll
        for (int i = 0; i < 8; i++) {
            if (!there) v[e][i] = 0.0f;
            square[i] = mul(v[e][i], v[e][i]);
        }
        if (own[e] < SUPERS) store8(squares[own[e]] + 8 * lane_id(), square);
    }
    __syncthreads();
    for (int lane = threadIdx.x; lane < SUPER; lane += ROW_THREADS) {
        float sum = squares[0][lane];  // no square is -0, so that nothing is lost by adding it to 0
#pragma unroll
        for (int s = 1; s < SUPERS; s++) sum = add(sum, squares[s][lane]);
        buffer[lane] = sum;
    }
    __syncthreads();
    float mean = div(buffer_tree(buffer), float(n));
    float r = div(1.0f, square_root(add(mean, eps)));
#pragma unroll
    for (int e = 0; e < EACH; e++) {
        if (own[e] >= SUPERS) break;
#pragma unroll
        for (int i = 0; i < 8; i++) v[e][i] = mul(mul(v[e][i], r), scale[e][i]);
        if (own[e] * SUPER + 8 * lane_id() < n) store8(y + row * n + column[e], v[e]);
        quantise_superblock(v[e], out + row * SUPERS + own[e]);
    }
}
