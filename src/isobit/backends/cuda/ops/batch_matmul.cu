// y = W x in a decode step of several sequences: few tokens a matrix, many matrices. Weights stream
// through shared memory once; nothing but their bytes should take time. WEIGHT: a struct of
// tiles.cuh.
//
// Units of a group of pairs are 16 rows of its matrix each, or, with GATED, the same 8 rows of gate and
// up, whose SwiGLU is then the result. Units of all groups lie in a row, of which every block of the
// grid takes an equal part, and of that its warps a unit in turn. Where units are few (SPLIT), a block's
// warps take one together, a superblock in turn. Each warp fetches for itself, DEPTH superblocks of 16
// rows ahead. With BOUNDS other parts have some columns of the activations (FLOATS), or read the SwiGLU (GATED).
#include "step.cuh"
#include "exchange.cuh"
#include "sorted_pairs.cuh"
#include "tile_pairs.cuh"

#ifndef BLOCK
#define BLOCK 256  // threads
#endif
constexpr int BATCH_WARPS = BLOCK / WARP, COLUMN_TILES = COLUMNS / 8;
#ifdef SPLIT  // with at least BATCH_WARPS superblocks
#ifdef GATED
#error "a unit of both gate and up is not split"
#endif
constexpr int UNIT_STEP = 1, SUPER_STEP = BATCH_WARPS;
#else
constexpr int UNIT_STEP = BATCH_WARPS, SUPER_STEP = 1;
#endif
// The first of a warp's units, and of its superblocks of a unit.
DEV int unit_offset() { return warp_id() % UNIT_STEP; }
DEV int first_super() { return warp_id() % SUPER_STEP; }

// A warp's weights on their way, unit after unit.
template <class W>
struct Stream {
    static constexpr int SUPER_BYTES = 2 * W::TILE_BYTES;  // of the 16 rows of a unit
    static constexpr int ARRIVALS = 64, BYTES = ARRIVALS + DEPTH * SUPER_BYTES;
    const uint8 *first, *second;
    int64 matrix_bytes;
    const PairGroup* groups;
    int units, supers, unit, end;  // unit: that is fetched from now
    uint8* memory;                 // of this warp: arrivals, then slots
    const uint8* from[2] = {};     // superblock `super` of the unit's two tiles
    int super = first_super();     // fetched next
    int to = 0, use = 0, phase = 0;  // slots that are filled and emptied next; of the latter's arrival

    DEV Stream(const uint8* first, const uint8* second, int64 matrix_bytes, const PairGroup* groups,
               int units, int supers, uint8* memory)
        : first(first), second(second), matrix_bytes(matrix_bytes), groups(groups), units(units),
          supers(supers), memory(memory + warp_id() * BYTES) {
#ifdef BULK_COPIES
        if (lane_id() < DEPTH) arrival_init(arrival(lane_id()));
        __syncwarp();
#endif
    }
    DEV void start(int begin, int end_of_block) {
        unit = begin;
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

   private:
    DEV uint8* slot(int i) const { return memory + ARRIVALS + i * SUPER_BYTES; }
#ifdef BULK_COPIES
    DEV Arrival* arrival(int i) const { return reinterpret_cast<Arrival*>(memory) + i; }
#endif
    DEV void fetch() {
        if (unit < end) {
            if (super == first_super()) find();
            uint8* bytes = slot(to);
#ifdef BULK_COPIES
            if (lane_id() == 0) {
                Arrival* a = arrival(to);
                arrival_expect(a, SUPER_BYTES);
                copy_bulk(bytes, from[0], W::TILE_BYTES, a);
                copy_bulk(bytes + W::TILE_BYTES, from[1], W::TILE_BYTES, a);
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
            if (super >= supers) super = first_super(), unit += UNIT_STEP;
        }
#ifndef BULK_COPIES
        commit_copies();
#endif
    }
    DEV void find() {
        int index = unit / units, in_matrix = unit - index * units, column = supers * W::TILE_BYTES;
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
    DEV int input(int i) const { return output(i) / top_k; }
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

// Activations of `count` items from place `begin` on to shared memory, [superblock][column].
DEV void fetch_activations(const Input* x, int supers, int begin, int count, const PairRows& pair_rows,
                           const Exchange<Cut>& exchange, ColumnActivations* to) {
    for (int i = warp_id(); i < count * supers; i += BATCH_WARPS) {
        int column = i / supers, s = i - column * supers;
        fetch_superblock(to + s * COLUMNS + column, x, pair_rows.input(begin + column), s, supers, exchange);
    }
    commit_copies();
    wait_copies<0>();
}

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

// The units of a block, at … end - 1, whose first weights are on their way: item i reads activation row
// pair_rows.input(i) and writes row output(i) of y, `stride` floats each. With TOGETHER, as many groups as fit
// share the place for activations, their items lying side by side. parts: of SPLIT, behind the streams.
template <class W>
DEV void multiply_units(Stream<W>& weights, int at, int end, const Input* x, const PairGroup* groups,
                        const PairRows& pair_rows, const Exchange<Cut>& exchange, ColumnActivations* acts, float* parts,
                        float* y, int stride) {
    const int units = weights.units, supers = weights.supers;
    int unit = at + unit_offset(), g = lane_id() / 4, t = lane_id() % 4;
#ifdef SPLIT  // superblocks' parts of a unit, by superblock, tile of columns and lane, twice
    constexpr int VALUES = COLUMN_TILES * 4 * WARP;
    float* part = parts;
#endif
    while (at < end) {
        int index = at / units, next = index + 1;
        PairGroup group = groups[index];
        int first = group.begin, pairs = group.count;
#ifdef TOGETHER
        while (int64(next) * units < end && pairs + groups[next].count <= COLUMNS)
            pairs += groups[next++].count;
#endif
        at = int(min(int64(next) * units, int64(end)));
        __syncthreads();  // everyone is done with the activations before
        fetch_activations(x, supers, first, pairs, pair_rows, exchange, acts);
        __syncthreads();
        for (; unit < at; unit += UNIT_STEP) {
#ifdef TOGETHER
            index = unit / units, group = groups[index];
#endif
            int in_matrix = unit - index * units;
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
#pragma unroll 8
                for (int s = 0; s < supers; s++) y_row = add(y_row, part[VALUES * s + e]);
                if (pair < group.count)
                    y[int64(pair_rows.output(group.begin + pair)) * stride + 16 * in_matrix +
                      i / 2 * 8 + lane / 4] = y_row;
            }
            part = part == parts ? parts + VALUES * supers : parts;  // others may still add
#else
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
                    out[8 * in_matrix + g] = value;
#ifdef BOUNDS
                    exchange.send(exchange.at(row, 0) + exchange.first + 8 * in_matrix + g, value);
#endif
#else
                    out[16 * in_matrix + g] = sum[n][c];
                    out[16 * in_matrix + 8 + g] = sum[n][2 + c];
#endif
                }
#endif
        }
    }
}

struct Product {
    const uint8 *first, *second;
    int64 matrix_bytes;
    int units, supers;
    const Input* x;
    const int* n_groups;
    const PairGroup* groups;
    PairRows pair_rows;
    float* y;
    int stride;
    Exchange<Cut> exchange;

    // By a block of so many.
    template <class W>
    DEV void make(int block, int blocks) {
        DYNAMIC_SHARED(ColumnActivations, acts);
        uint8* memory = reinterpret_cast<uint8*>(acts + COLUMNS * supers);
        Stream<W> weights(first, second, matrix_bytes, groups, units, supers, memory);
        int64 all = int64(*n_groups) * units;
        int at = int(all * block / blocks), end = int(all * (block + 1) / blocks);
        weights.start(at + unit_offset(), end);
#ifdef PLANNED
        wait_for_previous();
#endif
        float* parts = reinterpret_cast<float*>(memory + BATCH_WARPS * Stream<W>::BYTES);
        multiply_units(weights, at, end, x, groups, pair_rows, exchange, acts, parts, y, stride);
    }
};

// With PLANNED, groups and sorted pairs are known before the kernel ahead has ended. With MORE, a struct of
// tiles.cuh, `second` is a matrix of that format, whose rows come behind those of `first`; `more_blocks` of
// the grid take its units.
KERNEL(BLOCK) batch_matmul(const uint8* first, const uint8* second, int64 matrix_bytes, int units,
                           int supers, const Input* x, const int* n_groups, const PairGroup* groups,
                           const int* sorted_pairs, int top_k, float* y, int stride, int more_units,
                           int more_blocks, const uint64* exchanges, int site) {
    Exchange<Cut> exchange(exchanges, site);
#ifndef PLANNED
    wait_for_previous();  // before the next kernel starts, to which groups are known so
#endif
    let_next_start();
    Product product = {first,    second, matrix_bytes,    units, supers, x,
                       n_groups, groups, {sorted_pairs, top_k}, y,     stride, exchange};
    int blocks = gridDim.x - more_blocks;
#ifdef MORE
    if (int(blockIdx.x) >= blocks) {
        product.first = second, product.y = y + 16 * units, product.units = more_units;
        return product.make<MORE>(blockIdx.x - blocks, more_blocks);
    }
#endif
    product.make<WEIGHT>(blockIdx.x, blocks);
}
