// Weights of groups of pairs (sorted_pairs.cuh) on their way to shared memory, and which of them a warp takes.
//
// A block's warps take a row block in turn; with SPLIT, where row blocks are few, one together, a superblock in
// turn. Each warp fetches for itself, DEPTH superblocks of 16 rows ahead: with GATED 8 of gate and 8 of up.
// BLOCK: threads.
#pragma once
#include "copy.cuh"
#include "sorted_pairs.cuh"

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
    static constexpr int SUPER_BYTES = whole_lines(2 * W::TILE_BYTES);  // of the 16 rows of a row block
    static constexpr int ARRIVALS = LINE, BYTES = ARRIVALS + DEPTH * SUPER_BYTES;
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
                arrival_expect(a, 2 * W::TILE_BYTES);
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
