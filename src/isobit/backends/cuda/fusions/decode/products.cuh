// Matrix-vector products over tiles in a decode step.
#pragma once
#include "decode.cuh"
#include "copy.cuh"
#include "tiles.cuh"

// A block's tiles, four to a warp at a time (a step): eight lanes hold the eight rows of one. WHERE
// maps the number of a tile to its address and activation. The product of tile j and row r goes to
// part[8j + r], those of the next token's behind all of the block. Tiles come through slots in shared
// memory, AHEAD steps of each warp ahead.
template <class W, class Where, int AHEAD>
struct Products {
    static constexpr int SLOT = whole_lines(4 * W::TILE_BYTES), ARRIVALS = whole_lines(WARPS * AHEAD * 8);
    // Of shared memory, for a block of so many tiles.
    DEV static int bytes(int tiles) { return ARRIVALS + min((tiles + 3) / 4, AHEAD * WARPS) * SLOT; }

    const Where& where;
    uint8* memory;
    int tiles, warp_index, fetched = 0;  // 0 … WARPS-1; its steps fetched so far
    uint32 corrected = 0;          // slots that were filled twice at the start, a bit each

    DEV Products(const Where& where, uint8* memory, int tiles, int warp_index)
        : where(where), memory(memory), tiles(tiles), warp_index(warp_index) {
#ifdef BULK_COPIES
        if (lane_id() < AHEAD) arrival_init(arrival(lane_id(), warp_index));
        __syncwarp();
#endif
    }
    // What each warp begins with, up to step `to`; where copies allow it for all warps by those from number `first` on: who
    // asks for more than can be on its way at once has to wait, and others have something to do meanwhile.
    DEV void start(int first = 0, int to = AHEAD) {
#ifdef BULK_COPIES
#pragma unroll 1
        for (int step = warp_index < first ? to : fetched; step < to; step++)
#pragma unroll 1
            for (int warp = warp_index - first; warp < WARPS; warp += WARPS - first) fetch(step, warp);
        fetched = to;
#else
        while (fetched < to) fetch(fetched++, warp_index);
#endif
    }
    // Fetch once more what was started with and has another address since.
    template <class Changed>
    DEV void correct(Changed changed) {
#pragma unroll 1
        for (int step = 0; step < AHEAD && first_of(step) < tiles; step++) {
            if (!__ballot_sync(~0u, changed(min(first_of(step) + lane_id() % 4, tiles - 1)))) continue;
            wait_for_start(step);
            fetch(step, warp_index);
            corrected |= 1u << step;
        }
        corrections_sent();
    }
    // Every tile with N tokens' activations, each token's `acts_step` behind those of the one before,
    // its products `part_step`.
    template <int N = ROWS>
    DEV void run(const ActivationBlock* acts, float* part, int acts_step = 0, int part_step = 0) {
#pragma unroll 1
        for (int step = 0; first_of(step) < tiles; step++) {
            wait(step);
            int sub = lane_id() / TILE_ROWS, row = lane_id() % TILE_ROWS, j = first_of(step) + sub;
            const uint8* tile = slot(step, warp_index) + sub * W::TILE_BYTES;
            if (j < tiles) products<N>(tile, row, acts + where.act(j), part + j * TILE_ROWS + row, acts_step, part_step);
            __syncwarp();
            fetch(fetched++, warp_index);
        }
    }

   private:
    // A lane's row with N tokens.
    template <int N>
    DEV static void products(const uint8* tile, int row, const ActivationBlock* a, float* p, int acts_step,
                             int part_step) {
#pragma unroll 1
        for (int r = 1; r < N; r += 2) {  // registers hold no more than two
            float t[2];
            W::template dots_shared<2>(tile, row, a, acts_step, t);
            p[0] = mul(a->d, t[0]);
            p[part_step] = mul(a[acts_step].d, t[1]);
            a += 2 * acts_step, p += 2 * part_step;
        }
        if (N % 2) {
            float t[1];
            W::template dots_shared<1>(tile, row, a, 0, t);
            p[0] = mul(a->d, t[0]);
        }
    }
    DEV int first_of(int step) const { return first_of(step, warp_index); }
    DEV static int first_of(int step, int warp) { return 4 * (step * WARPS + warp); }
    DEV uint8* slot(int step, int warp) const { return memory + ARRIVALS + (step % AHEAD * WARPS + warp) * SLOT; }
#ifdef BULK_COPIES
    DEV Arrival* arrival(int step, int warp) const {
        return reinterpret_cast<Arrival*>(memory) + warp * AHEAD + step % AHEAD;
    }
    DEV void fetch(int step, int warp) {
        int lane = lane_id(), first = first_of(step, warp), n = min(4, tiles - first);
        if (n <= 0) return;
        if (lane == 0) arrival_expect(arrival(step, warp), n * W::TILE_BYTES);
        // Tiles that lie behind one another are one copy.
        const uint8* from = where.tile(first + min(lane, n - 1));
        int64 before = shuffle(reinterpret_cast<int64>(from), lane - 1);
        bool begins = lane < n && (lane == 0 || reinterpret_cast<int64>(from) != before + W::TILE_BYTES);
        uint32 all = __ballot_sync(~0u, begins) | 1u << n;
        if (begins)
            copy_bulk(slot(step, warp) + lane * W::TILE_BYTES, from,
                      __ffs(all >> lane >> 1) * W::TILE_BYTES, arrival(step, warp));
    }
    DEV void wait(int step) const {
        arrival_wait(arrival(step, warp_index), step / AHEAD + (corrected >> step % AHEAD & 1));
    }
    DEV void wait_for_start(int step) const { arrival_wait(arrival(step, warp_index), 0); }
    DEV void corrections_sent() const {}
#else
    DEV void fetch(int step, int warp) {
        int n = min(4, tiles - first_of(step, warp));
        for (int t = 0; t < n; t++) {
            const uint8* from = where.tile(first_of(step, warp) + t);
            for (int i = 16 * lane_id(); i < W::TILE_BYTES; i += 16 * WARP)
                copy_async(slot(step, warp) + t * W::TILE_BYTES + i, from + i);
        }
        commit_copies();
    }
    DEV void wait(int) const {
        wait_copies<AHEAD - 1>();
        __syncwarp();
    }
    // Copies are told apart by their order alone, so all of a correction are waited for.
    DEV void wait_for_start(int) const { wait_copies<0>(); }
    DEV void corrections_sent() const { wait_copies<0>(); }
#endif
};

// (((0 + p_0) + p_1) + …) over the superblocks of one row.
template <int SUPERS>
DEV float sum_supers(const float* part) {
    float sum = 0.0f;
#pragma unroll 8
    for (int s = 0; s < SUPERS; s++) sum = add(sum, part[s * TILE_ROWS]);
    return sum;
}
