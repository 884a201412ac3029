// Row blocks of weights (weight_stream.cuh) times the activations of their pairs, and where the results go: shared
// memory holds all activations of a group, or, where these do not fit, some superblocks of them at a time.
#pragma once
#include "exchange.cuh"
#include "sorted_pairs.cuh"
#include "tile_pairs.cuh"
#include "weight_stream.cuh"

// Where a group's pairs are: activation rows, and rows of the result.
struct PairRows {
    const int* sorted_pairs;  // null where pairs are in order
    int top_k;
    DEV int output(int i) const { return sorted_pairs ? sorted_pairs[i] : i; }
    DEV int input(int i) const { return quotient(output(i), top_k); }
};

// Superblock s of activation row i.
#ifdef FLOATS  // that are quantised on their way
typedef float Input;
DEV void fetch_superblock(ColumnActivations* to, const float* x, int64 i, int s, int supers, const Exchange<Cut>& exchange) {
    float v[8];
#ifdef BOUNDS
    exchange.load_super(x + i * exchange.columns, i, s, v);
#else
    load8(x + (i * supers + s) * SUPER + 8 * lane_id(), v);
#endif
    quantise_act(v, to);
}
#else
typedef ActivationBlock Input;
DEV void fetch_superblock(ColumnActivations* to, const ActivationBlock* x, int64 i, int s, int supers, const Exchange<Cut>&) {
    copy_activations(to, x + i * supers + s);
}
#endif

// Activations of `count` pairs from place `begin` on to shared memory, [superblock][column].
DEV void fetch_activations(const Input* x, int supers, int begin, int count, const PairRows& pair_rows,
                           const Exchange<Cut>& exchange, ColumnActivations* to) {
#ifndef FLOATS
#pragma unroll 1
#endif
    for (int i = warp_id(); i < count * supers; i += BATCH_WARPS) {
        int column = quotient(i, supers), s = i - column * supers;
        fetch_superblock(to + s * COLUMNS + column, x, pair_rows.input(begin + column), s, supers, exchange);
    }
    commit_copies();
    wait_copies<0>();
}

#ifdef SHARED_FETCH
// The same by all blocks of a cluster, each for all. arrival: of each; the number of fetches says its phase.
DEV void fetch_activations_together(const Input* x, int supers, int begin, int count, const PairRows& pair_rows,
                                    ColumnActivations* to, Arrival* arrival, int fetches) {
    int all = count * supers;
    if (threadIdx.x == 0) arrival_expect(arrival, all * COLUMN_BYTES);
#pragma unroll 1
    for (int i = lane_id() * BATCH_WARPS + warp_id(); i * BLOCKS_TOGETHER < all; i += BLOCK) {
        int act = i * BLOCKS_TOGETHER + block_together();
        if (act >= all) break;
        int column = quotient(act, supers), s = act - column * supers;
        const Input* row = x + int64(pair_rows.input(begin + column)) * supers;
        copy_bulk_to_all(to + s * COLUMNS + column, row + s, COLUMN_BYTES, arrival, (1 << BLOCKS_TOGETHER) - 1);
    }
    arrival_wait(arrival, fetches);
}
#endif

// v: of a superblock's rows and N tiles of columns, each lane's part as TilePair gives it, scaled.
template <class W, int N>
DEV void product(const int* const (&tile)[2], const ColumnActivations* here, int count,
                 float (&v)[COLUMN_TILES][4]) {
    if constexpr (N > 1)
        if (count <= 8 * (N - 1)) return product<W, N - 1>(tile, here, count, v);
    Columns x[N];
    float u[N][4];
    int t = lane_id() % 4;
#pragma unroll
    for (int n = 0; n < N; n++) x[n] = Columns(here + 8 * n, count - 8 * n);
    TilePair<W>::product(tile, x, u);
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int column = min(8 * n + 2 * t + i % 2, count - 1);
            v[n][i] = mul(here[column].d, u[n][i]);
        }
}

#ifndef SPLIT
// A row block's results, or the SwiGLU of its rows.
DEV void store_row_block(const float (&sum)[COLUMN_TILES][4], int in_matrix, const PairGroup& group,
                         const PairRows& pair_rows, const Exchange<Cut>& exchange, const Mirrors& mirrors, float* y,
                         int stride) {
    int g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll
    for (int n = 0; n < COLUMN_TILES; n++)
#pragma unroll
        for (int c = 0; c < 2; c++) {
            int column = 8 * n + 2 * t + c;
            if (column >= group.count) continue;
            int64 row = pair_rows.output(group.begin + column);
            float* out = y + row * stride;
#ifdef GATED
            float value = isobit::silu_gate(sum[n][c], sum[n][2 + c]);
            mirrors.store(out + 8 * in_matrix + g, value);
#ifdef BOUNDS
            exchange.send(exchange.at(row, 0) + exchange.first + 8 * in_matrix + g, value);
#endif
#else
            out += 16 * in_matrix + g;
            mirrors.store(out, sum[n][c]);
            mirrors.store(out + 8, sum[n][2 + c]);
#endif
        }
}
#endif

// The row blocks of a block, at … end - 1, whose first weights are on their way: pair i reads activation row
// pair_rows.input(i) and writes row output(i) of y, `stride` floats each. With TOGETHER, as many groups as fit
// share the place for activations, their pairs lying side by side. parts: of SPLIT, behind the streams.
template <class W>
DEV void multiply_row_blocks(Stream<W>& weights, int at, int end, const Input* x, const Groups& groups,
                        const PairRows& pair_rows, const Exchange<Cut>& exchange, const Mirrors& mirrors,
                        ColumnActivations* acts, float* parts, float* y, int stride) {
    const int row_blocks = weights.row_blocks, supers = weights.supers;
    int row_block = at + row_block_offset(), g = lane_id() / 4, t = lane_id() % 4;
#ifdef SPLIT  // superblocks' parts of a row block, by superblock, tile of columns and lane, twice
    constexpr int VALUES = COLUMN_TILES * 4 * WARP;
    float* part = parts;
#endif
    int fetches = 0;
    while (at < end) {
        int index = quotient(at, row_blocks), next = index + 1;
        PairGroup group = groups[index];
        int first = group.begin, pairs = group.count;
#ifdef TOGETHER
        while (int64(next) * row_blocks < end && pairs + groups[next].count <= COLUMNS)
            pairs += groups[next++].count;
#endif
        at = int(min(int64(next) * row_blocks, int64(end)));
#ifdef SHARED_FETCH
        if (fetches) sync_cluster();
        fetch_activations_together(x, supers, first, pairs, pair_rows, acts, weights.spare_arrival(), fetches++);
#else
        if (fetches++) __syncthreads();  // everyone is done with the activations before
        fetch_activations(x, supers, first, pairs, pair_rows, exchange, acts);
        __syncthreads();
#endif
        for (; row_block < at; row_block += ROW_BLOCK_STEP) {
#ifdef TOGETHER
            index = quotient(row_block, row_blocks), group = groups[index];
#endif
            int in_matrix = row_block - index * row_blocks;
            const ColumnActivations* here = acts + group.begin - first;
#ifndef SPLIT
            float sum[COLUMN_TILES][4] = {};
#endif
#pragma unroll 1
            for (int s = first_super(); s < supers; s += SUPER_STEP) {
                const int* tile[2];
                float v[COLUMN_TILES][4] = {};
                weights.wait(tile);
                product<W, COLUMN_TILES>(tile, here + s * COLUMNS, group.count, v);
                weights.done();
#pragma unroll
                for (int n = 0; n < COLUMN_TILES; n++)
#pragma unroll
                    for (int i = 0; i < 4; i++) {
#ifdef SPLIT
                        part[VALUES * s + 4 * WARP * n + 4 * lane_id() + i] = v[n][i];
#else
                        sum[n][i] = add(sum[n][i], v[n][i]);
#endif
                    }
            }
#ifdef SPLIT
            __syncthreads();
            for (int e = threadIdx.x; e < VALUES; e += BLOCK) {
                int lane = e / 4 % WARP, i = e % 4, pair = e / (4 * WARP) * 8 + lane % 4 * 2 + i % 2;
                float y_row = 0.0f;
#pragma unroll 4
                for (int s = 0; s < supers; s++) y_row = add(y_row, part[VALUES * s + e]);
                if (pair < group.count)
                    mirrors.store(y + int64(pair_rows.output(group.begin + pair)) * stride + 16 * in_matrix +
                                      i / 2 * 8 + lane / 4, y_row);
            }
            part = part == parts ? parts + VALUES * supers : parts;  // others may still add
#else
            store_row_block(sum, in_matrix, group, pair_rows, exchange, mirrors, y, stride);
#endif
        }
    }
}

#ifdef SUPERS_AT_ONCE
// The same where the activations of a group are more than fit: SUPERS_AT_ONCE superblocks of them at a time, while the next
// are on their way. All row blocks, at … end - 1, are of one group; the warps take a round of them together.
template <class W>
DEV void multiply_in_chunks(Stream<W>& weights, int at, int end, const Input* x, const Groups& groups,
                            const PairRows& pair_rows, const Exchange<Cut>& exchange, const Mirrors& mirrors,
                            ColumnActivations* acts, float* y, int stride) {
    const int row_blocks = weights.row_blocks, supers = weights.supers, chunks = supers / SUPERS_AT_ONCE;
    int index = quotient(at, row_blocks);
    PairGroup group = groups[index];
    auto fetch = [&](int chunk) {
        ColumnActivations* to = acts + chunk % 2 * (SUPERS_AT_ONCE * COLUMNS);
#pragma unroll 1
        for (int i = warp_id(); i < COLUMNS * SUPERS_AT_ONCE; i += BATCH_WARPS) {
            int column = i / SUPERS_AT_ONCE, s = i % SUPERS_AT_ONCE;
            if (column >= group.count) break;
            const Input* row = x + int64(pair_rows.input(group.begin + column)) * supers;
            copy_activations(to + s * COLUMNS + column, row + chunk * SUPERS_AT_ONCE + s);
        }
        commit_copies();
    };
    fetch(0);
    for (; at < end; at += BATCH_WARPS) {
        int row_block = at + warp_id();
        float sum[COLUMN_TILES][4] = {};
#pragma unroll 1
        for (int chunk = 0; chunk < chunks; chunk++) {
            wait_copies<0>();
            __syncthreads();  // and everyone is done with the chunk before
            if (chunk + 1 < chunks) fetch(chunk + 1);
            if (row_block >= end) continue;
            const ColumnActivations* here = acts + chunk % 2 * (SUPERS_AT_ONCE * COLUMNS);
#pragma unroll 1
            for (int s = 0; s < SUPERS_AT_ONCE; s++) {
                const int* tile[2];
                float v[COLUMN_TILES][4] = {};
                weights.wait(tile);
                product<W, COLUMN_TILES>(tile, here + s * COLUMNS, group.count, v);
                weights.done();
#pragma unroll
                for (int n = 0; n < COLUMN_TILES; n++)
#pragma unroll
                    for (int i = 0; i < 4; i++) sum[n][i] = add(sum[n][i], v[n][i]);
            }
        }
        if (at + BATCH_WARPS < end) {
            __syncthreads();
            fetch(0);
        }
        if (row_block >= end) continue;
        store_row_block(sum, row_block - index * row_blocks, group, pair_rows, exchange, mirrors, y, stride);
    }
}
#endif
