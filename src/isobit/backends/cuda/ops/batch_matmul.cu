// y = W x in a decode step of several sequences: few tokens a matrix, many matrices. Weights stream
// through shared memory once; nothing but their bytes should take time. WEIGHT: a struct of
// tiles.cuh.
//
// Row blocks of a group of pairs are 16 rows of its matrix each, or, with GATED, the same 8 rows of gate and
// up, whose SwiGLU is then the result. Row blocks of all groups lie in a row, of which every block of the
// grid takes an equal part: its warps fetch their weights (weight_stream.cuh) and multiply them
// (row_blocks.cuh). With BOUNDS other parts have some columns of the activations (FLOATS), or read the SwiGLU
// (GATED).
#include "step.cuh"
#include "row_blocks.cuh"
#ifdef OWN_ORDER
#include "own_order.cuh"
#endif
#if defined AHEAD || defined EARLY
#include "ahead.cuh"
#endif
#ifdef WEIGHED
#include "group_shares.cuh"
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
