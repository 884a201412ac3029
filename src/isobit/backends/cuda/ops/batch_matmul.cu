// y = W x in a decode step of several sequences: few tokens a matrix, many matrices. Weights stream
// through shared memory once; nothing but their bytes should take time. WEIGHT: a struct of
// tiles.cuh.
//
// Row blocks of a group of pairs are 16 rows of its matrix each, or, with GATED, the same 8 rows of gate and
// up, whose SwiGLU is then the result. Row blocks of all groups lie in a row, of which every block of the
// grid takes an equal part, and of that its warps a row block in turn. Where row blocks are few (SPLIT), a block's
// warps take one together, a superblock in turn. Each warp fetches for itself, DEPTH superblocks of 16
// rows ahead. With BOUNDS other parts have some columns of the activations (FLOATS), or read the SwiGLU (GATED).
#include "step.cuh"
#include "exchange.cuh"
#include "sorted_pairs.cuh"
#include "tile_pairs.cuh"

#ifndef BLOCK
#define BLOCK 256  // threads
#endif
#ifdef OWN_ORDER
#include "own_order.cuh"
#endif
#if defined AHEAD || defined EARLY
#include "ahead.cuh"
#endif
#ifdef WEIGHED
#include "group_shares.cuh"
#endif
constexpr int BATCH_WARPS = BLOCK / WARP, COLUMN_TILES = COLUMNS / 8;
// Blocks of a cluster take row blocks as one block would, and each has its share of the activations sent to all.
#if defined CLUSTER && defined BULK_COPIES
#define SHARED_FETCH
constexpr int BLOCKS_TOGETHER = CLUSTER;
#else
constexpr int BLOCKS_TOGETHER = 1;
#endif
#ifdef SPLIT  // with at least BATCH_WARPS superblocks
#ifdef GATED
#error "a row_block of both gate and up is not split"
#endif
constexpr int ROW_BLOCKS_AT_ONCE = 1, SUPER_STEP = BATCH_WARPS;
#else
constexpr int ROW_BLOCKS_AT_ONCE = BATCH_WARPS, SUPER_STEP = 1;
#endif
constexpr int ROW_BLOCK_STEP = ROW_BLOCKS_AT_ONCE * BLOCKS_TOGETHER;
DEV int block_together() { return blockIdx.x % BLOCKS_TOGETHER; }
// The first of a warp's row blocks, and of its superblocks of a row block.
DEV int row_block_offset() { return warp_id() % ROW_BLOCKS_AT_ONCE * BLOCKS_TOGETHER + block_together(); }
DEV int first_super() { return warp_id() % SUPER_STEP; }

// The groups of pairs: as they are listed, or all pairs by COLUMNS.
struct Groups {
    const PairGroup* listed;  // null if not
    int pairs;
    DEV int count() const { return (pairs + COLUMNS - 1) / COLUMNS; }
    DEV PairGroup operator[](int i) const {
        return listed ? listed[i] : PairGroup{0, i * COLUMNS, min(COLUMNS, pairs - i * COLUMNS), 0};
    }
};

// A warp's weights on their way, row block after row block.
template <class W>
struct Stream {
    static constexpr int SUPER_BYTES = 2 * W::TILE_BYTES;  // of the 16 rows of a row block
    static constexpr int ARRIVALS = 64, BYTES = ARRIVALS + DEPTH * SUPER_BYTES;
    const uint8 *first, *second;
    int64 matrix_bytes;
    Groups groups;
    int row_blocks, supers, row_block, end;  // row_block: that is fetched from now
    uint8* memory;                 // of this warp: arrivals, then slots
    const uint8* from[2] = {};     // superblock `super` of the row block's two tiles
    int super = first_super();     // fetched next
    int to = 0, use = 0, phase = 0;  // slots that are filled and emptied next; of the latter's arrival

    DEV Stream(const uint8* first, const uint8* second, int64 matrix_bytes, Groups groups, int row_blocks,
               int supers, uint8* memory)
        : first(first), second(second), matrix_bytes(matrix_bytes), groups(groups), row_blocks(row_blocks),
          supers(supers), memory(memory + warp_id() * BYTES) {
#ifdef BULK_COPIES
        if (lane_id() < DEPTH) arrival_init(arrival(lane_id()));
        __syncwarp();
#endif
    }
    DEV void start(int begin, int end_of_block) {
        row_block = begin;
        end = end_of_block;
#pragma unroll 1
        for (int i = 0; i < DEPTH; i++) fetch();
    }
    // The two tiles of the next superblock, once they are there.
    DEV void wait(const int* (&tile)[2]) const {
#ifdef BULK_COPIES
        arrival_wait(arrival(use), phase);
#else
        wait_copies<DEPTH - 1>();
        __syncwarp();
#endif
        tile[0] = reinterpret_cast<const int*>(slot(use));
        tile[1] = tile[0] + W::TILE_BYTES / 4;
    }
    DEV void done() {
        if (++use == DEPTH) use = 0, phase ^= 1;
        __syncwarp();
        fetch();
    }

#ifdef SHARED_FETCH
    DEV Arrival* spare_arrival() const {  // of the block
        return reinterpret_cast<Arrival*>(memory - warp_id() * BYTES + ARRIVALS) - 1;
    }
#endif

   private:
    DEV uint8* slot(int i) const { return memory + ARRIVALS + i * SUPER_BYTES; }
#ifdef BULK_COPIES
    DEV Arrival* arrival(int i) const { return reinterpret_cast<Arrival*>(memory) + i; }
#endif
    DEV void fetch() {
        if (row_block < end) {
            if (super == first_super()) find();
            uint8* bytes = slot(to);
#ifdef BULK_COPIES
            if (lane_id() == 0) {
                Arrival* a = arrival(to);
                arrival_expect(a, SUPER_BYTES);
                COPY_WEIGHTS(bytes, from[0], W::TILE_BYTES, a);
                COPY_WEIGHTS(bytes + W::TILE_BYTES, from[1], W::TILE_BYTES, a);
            }
#else
            for (int i = 16 * lane_id(); i < W::TILE_BYTES; i += 16 * WARP) {
                copy_async(bytes + i, from[0] + i);
                copy_async(bytes + W::TILE_BYTES + i, from[1] + i);
            }
#endif
            from[0] += SUPER_STEP * W::TILE_BYTES;
            from[1] += SUPER_STEP * W::TILE_BYTES;
            to = to + 1 < DEPTH ? to + 1 : 0;
            super += SUPER_STEP;
            if (super >= supers) super = first_super(), row_block += ROW_BLOCK_STEP;
        }
#ifndef BULK_COPIES
        commit_copies();
#endif
    }
    DEV void find() {
        int index = quotient(row_block, row_blocks), in_matrix = row_block - index * row_blocks, column = supers * W::TILE_BYTES;
        int64 matrix = groups[index].matrix * matrix_bytes;
#ifdef GATED
        from[0] = first + matrix + int64(in_matrix) * column;
        from[1] = second + matrix + int64(in_matrix) * column;
#else
        from[0] = first + matrix + int64(in_matrix) * 2 * column;
        from[1] = from[0] + column;
#endif
        from[0] += super * W::TILE_BYTES;
        from[1] += super * W::TILE_BYTES;
    }
};

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

struct Product {
    const uint8 *first, *second;
    int64 matrix_bytes;
    int row_blocks, supers;
    const Input* x;
    const int* n_groups;
    Groups groups;
    PairRows pair_rows;
    float* y;
    int stride, experts, each;
    Exchange<Cut> exchange;
    Mirrors mirrors;
#ifdef AHEAD
    Ahead ahead;
#endif

    // By a block of so many.
    template <class W>
    DEV void make(int block, int blocks) {
        DYNAMIC_SHARED(ColumnActivations, acts);
#ifdef SUPERS_AT_ONCE
        uint8* memory = reinterpret_cast<uint8*>(acts + 2 * SUPERS_AT_ONCE * COLUMNS);
#else
        uint8* memory = reinterpret_cast<uint8*>(acts + COLUMNS * supers);
#endif
#ifdef EARLY  // while experts are chosen; others than those that the product before brought
        Ahead{first, second, uint32(supers * W::TILE_BYTES), uint32(row_blocks * experts)}.template bring<EARLY, 4>();
#endif
#ifdef OWN_ORDER
        Order order(groups.pairs, experts, each, memory + BATCH_WARPS * Stream<W>::BYTES);
        groups.listed = order.groups, pair_rows.sorted_pairs = order.pair;
#ifndef PLANNED
        wait_for_previous();
        let_next_start();  // to which the experts are known
#endif
        int all = order.make(n_groups) * row_blocks;
#else
        int all = (n_groups ? *n_groups : groups.count()) * row_blocks;
#endif
        int cluster = block / BLOCKS_TOGETHER, clusters = blocks / BLOCKS_TOGETHER;
        // all * cluster / clusters and what comes behind, without products that 32 bits do not hold.
#ifdef WEIGHED
        Share share(groups.listed, *n_groups, row_blocks, block, blocks);
        int at = share.at, end = share.end;
#else
        int most = quotient(all, clusters), left = all - most * clusters;
        int at = most * cluster + quotient(left * cluster, clusters);
        int end = most * (cluster + 1) + quotient(left * (cluster + 1), clusters);
#endif
        Stream<W> weights(first, second, matrix_bytes, groups, row_blocks, supers, memory);
        weights.start(at + row_block_offset(), end);
#ifdef SHARED_FETCH
        if (threadIdx.x == 0) arrival_init(weights.spare_arrival());
        sync_cluster();
#endif
#ifdef OWN_ORDER
        order.place();
#endif
#ifdef AHEAD
        ahead.bring<AHEAD, 0>();
#endif
#ifdef PLANNED
        wait_for_previous();
#endif
#ifdef SUPERS_AT_ONCE
        multiply_in_chunks(weights, at, end, x, groups, pair_rows, exchange, mirrors, acts, y, stride);
#else
        float* parts = reinterpret_cast<float*>(memory + BATCH_WARPS * Stream<W>::BYTES);
        multiply_row_blocks(weights, at, end, x, groups, pair_rows, exchange, mirrors, acts, parts, y, stride);
#endif
    }
};

// Without n_groups and groups, all pairs have one matrix. With OWN_ORDER, n_groups are the experts of all
// pairs, and there are no groups and sorted pairs yet. With PLANNED, groups and sorted pairs, or these experts,
// are known before the kernel ahead has ended. With MORE, a struct of tiles.cuh, `second` is a matrix of that
// format, whose rows come behind those of `first`; `more_blocks` of the grid take its row blocks.
KERNEL(BLOCK) batch_matmul(const uint8* first, const uint8* second, int64 matrix_bytes, int row_blocks,
                           int supers, const Input* x, const int* n_groups, const PairGroup* groups,
                           const int* sorted_pairs, int top_k, float* y, int stride, int more_row_blocks,
                           int more_blocks, int pairs, int experts, int each, const uint64* exchanges, int site,
                           const uint8* ahead_first, const uint8* ahead_second, int ahead_bytes,
                           int ahead_row_blocks) {
    Exchange<Cut> exchange(exchanges, site);
#ifdef PLANNED
    let_next_start();
#elif !defined OWN_ORDER
    wait_for_previous();  // before the next kernel starts, to which groups are known so
    let_next_start();
#endif
    Product product = {first,    second,          matrix_bytes,          row_blocks, supers, x,
                       n_groups, {groups, pairs}, {sorted_pairs, top_k}, y,     stride, experts, each, exchange,
                       Mirrors(exchanges)};
#ifdef AHEAD
    product.ahead = {ahead_first, ahead_second, uint32(ahead_bytes), uint32(ahead_row_blocks)};
#endif
    int blocks = gridDim.x - more_blocks;
#ifdef MORE
    if (int(blockIdx.x) >= blocks) {
        product.first = second, product.y = y + 16 * row_blocks, product.row_blocks = more_row_blocks;
        return product.make<MORE>(blockIdx.x - blocks, more_blocks);
    }
#endif
    product.make<WEIGHT>(blockIdx.x, blocks);
}
