// RMS norm (docs/numerics.md, section 5), also of a sum, with the quantisation of what it gives.
// A row of WIDTH values, a multiple of 8, a block. Of a superblock a warp has eight values a lane in
// registers, from their load to the quantised block. A block of many superblocks has fewer warps, each
// of them for EACH. ADDED: rows that are added to x, 0 or 1; or more, the parts of a product
// (part_matmul.cu); or with WEIGHTED the rows of a weighted sum, with SHARED one more by the sigmoid of
// a product, of what it was made of with weights. AT_ONCE (common.cuh) has the compiler spend registers
// on many reads at once. With BOUNDS this part has some columns of what is added; all blocks run at
// once, and wait for the others' of the same row.
#include "exchange.cuh"

constexpr int SUPERS = (WIDTH + SUPER - 1) / SUPER;
#ifndef READ_AT_ONCE
#define READ_AT_ONCE 8
#endif
constexpr int WARPS = ROW_THREADS / WARP, EACH = (SUPERS + WARPS - 1) / WARPS;

#if defined WEIGHTED || ADDED > 1
// ((0 + w_1 * y_1) + w_2 * y_2) + … of eight columns of rows that lie so far apart; without w, of the rows alone.
DEV void sum_rows(const float* w, const float* y, int64 step, float (&sum)[8]) {
    constexpr int AT_ONCE_ROWS = ADDED < READ_AT_ONCE ? ADDED : READ_AT_ONCE;
#pragma unroll
    for (int i = 0; i < 8; i++) sum[i] = 0.0f;
#pragma unroll
    for (int first = 0; first < ADDED; first += AT_ONCE_ROWS) {
        float part[AT_ONCE_ROWS][8], by[AT_ONCE_ROWS];
#pragma unroll
        for (int r = 0; r < AT_ONCE_ROWS; r++) {
            if (first + r >= ADDED) break;
            if (w) by[r] = w[first + r];
            load8(y + (first + r) * step, part[r]);
        }
#pragma unroll
        for (int r = 0; r < AT_ONCE_ROWS; r++)
#pragma unroll
            for (int i = 0; i < 8; i++)
                if (first + r < ADDED) sum[i] = add(sum[i], w ? mul(by[r], part[r][i]) : part[r][i]);
    }
}
#endif

#if ADDED
// What is added to eight columns of a row; width: of what is here of it.
DEV void load_added(const float* added, const float* weights, int64 row, int width, int column, float (&more)[8]) {
#ifdef WEIGHTED
    sum_rows(weights + row * ADDED, added + row * ADDED * width + column, width, more);
#elif ADDED > 1  // by part, then by row, of which each has a block
    sum_rows(nullptr, added + row * width + column, int64(gridDim.x) * width, more);
#else
    load8(added + row * width + column, more);
#endif
}
#endif

// By lane, the sum of a block's products of a row, in the order of sum256.
DEV void add_lanes(const float (&products)[SUPERS][SUPER], float* buffer) {
#pragma unroll 1
    for (int lane = threadIdx.x; lane < SUPER; lane += ROW_THREADS) {
        float sum = products[0][lane];  // what it lacks, to begin with 0, is the sign of a 0
#pragma unroll
        for (int s = 1; s < SUPERS; s++) sum = add(sum, products[s][lane]);
        buffer[lane] = sum;
    }
}

// x += what is added; y = norm of x, out = y quantised. Rows from `first` on.
KERNEL(ROW_THREADS) norm_quantise(float* x, const float* added, const float* weights,
                                  const float* shared, const float* input, const float* gate,
                                  const float* norm, float eps, float* y, ActivationBlock* out,
                                  const uint64* exchanges, int site, int first) {
    __shared__ float squares[SUPERS][SUPER];
    __shared__ float buffer[SUPER];
    int own[EACH], column[EACH];  // superblocks, and of each the first of eight columns
    float v[EACH][8], scale[EACH][8];
#pragma unroll
    for (int e = 0; e < EACH; e++) {
        own[e] = warp_id() + e * WARPS;
        // Columns behind the last are computed as those are, and not stored.
        column[e] = min(own[e] * SUPER + 8 * lane_id(), WIDTH - 8);
        load8(norm + column[e], scale[e]);
    }
    Exchange<Cut> exchange(exchanges, site);
    let_next_start();
    wait_for_previous();
    int64 row = first + int(blockIdx.x);
    x += row * WIDTH;
    y += row * WIDTH;
#ifdef SHARED
#pragma unroll
    for (int e = 0; e < EACH; e++) {
        float a[8], b[8];
        load8(input + row * WIDTH + column[e], a);
        load8(gate + column[e], b);
        bool there = own[e] * SUPER + 8 * lane_id() < WIDTH;
#pragma unroll
        for (int i = 0; i < 8; i++) a[i] = there ? mul(b[i], a[i]) : 0.0f;
        if (own[e] < SUPERS) store8(squares[own[e]] + 8 * lane_id(), a);
    }
    __syncthreads();
    add_lanes(squares, buffer);
    __syncthreads();
    float share = add(buffer_tree(buffer), 0.0f);
    share = sigmoid(share);
    __syncthreads();
#endif
#if ADDED
    float more[EACH][8];
#ifdef BOUNDS
    int from[EACH];  // the part that has these columns; behind the last, this one
#pragma unroll
    for (int e = 0; e < EACH; e++) {
        from[e] = own[e] * SUPER + 8 * lane_id() < WIDTH ? Cut::part_of(column[e]) : Cut::PARTS;
        if (from[e] != exchange.rank) continue;
        load_added(added, weights, row, exchange.columns, column[e] - exchange.first, more[e]);
        exchange.send8<false>(exchange.at(row, own[e]), more[e]);
    }
#endif
#endif
#pragma unroll
    for (int e = 0; e < EACH; e++) {
        load8(x + column[e], v[e]);
#if ADDED
#ifdef BOUNDS
        if (from[e] < Cut::PARTS && from[e] != exchange.rank)
            exchange.receive8<false>(from[e], exchange.at(row, own[e]), more[e]);
#else
        load_added(added, weights, row, WIDTH, column[e], more[e]);
#endif
#ifdef SHARED
        float besides[8];
        load8(shared + row * WIDTH + column[e], besides);
#pragma unroll
        for (int i = 0; i < 8; i++) more[e][i] = add(more[e][i], mul(share, besides[i]));
#endif
#pragma unroll
        for (int i = 0; i < 8; i++) v[e][i] = add(v[e][i], more[e][i]);
#endif
    }
#pragma unroll
    for (int e = 0; e < EACH; e++) {
        bool there = own[e] * SUPER + 8 * lane_id() < WIDTH;
        if (ADDED && there) store8(x + column[e], v[e]);
        float square[8];
#pragma unroll
        for (int i = 0; i < 8; i++) {
            if (!there) v[e][i] = 0.0f;
            square[i] = mul(v[e][i], v[e][i]);
        }
        if (own[e] < SUPERS) store8(squares[own[e]] + 8 * lane_id(), square);
    }
    __syncthreads();
    add_lanes(squares, buffer);  // no square is -0
    __syncthreads();
    float mean = mean_of<WIDTH>(buffer_tree(buffer));
    float r = div(1.0f, square_root(add(mean, eps)));
#pragma unroll
    for (int e = 0; e < EACH; e++) {
        if (own[e] >= SUPERS) break;
#pragma unroll
        for (int i = 0; i < 8; i++) v[e][i] = mul(mul(v[e][i], r), scale[e][i]);
        if (own[e] * SUPER + 8 * lane_id() < WIDTH) store8(y + column[e], v[e]);
        quantise_superblock(v[e], out + row * SUPERS + own[e]);
    }
}
