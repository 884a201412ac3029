// What each part of a split model has of a value, put together on every part.
// FLAGGED: of many values, a flag says that all are there that a block sends; else each says so itself, as a
// word of twice the size (exchange.cuh). BLOCKS: at most so many, of WIDE threads.
#include "exchange.cuh"
#include "views.cuh"

constexpr int PARTS = Cut::PARTS;
constexpr int AHEAD = 4;  // values that a thread reads at once

// Value i of a part, of so many vectors.
struct Share {
    int first, width;
    int64 count;

    DEV Share(int part, int vectors)
        : first(Cut::first(part)), width(Cut::first(part + 1) - first), count(int64(vectors) * width) {}
    DEV int vector(int64 i) const { return int(i / width); }
    DEV int column(int64 i) const { return int(i % width); }
    // Where it stands in the whole.
    DEV int64 at(int64 i) const { return int64(vector(i)) * Cut::WHOLE + first + column(i); }
};

#ifdef FLAGGED
constexpr int FLAGS = PARTS * BLOCKS;  // words at the begin of an inbox, [PARTS][BLOCKS]
DEV void send(const Exchange<Cut>& e, int64 at, float value) {
#pragma unroll
    for (int part = 0; part < PARTS; part++)
        if (part != e.rank) write_word((int*)e.inbox[part] + FLAGS + at, int(bits(value)));
}
// The block's values have been sent; wait for what the same block of the others sends.
DEV void meet(const Exchange<Cut>& e, Patience& patience) {
    __syncthreads();
    int number = int(e.number);
#pragma unroll
    for (int part = 0; part < PARTS; part++) {
        if (int(threadIdx.x) != part || part == e.rank) continue;
        fence();
        write_word((int*)e.inbox[part] + e.rank * BLOCKS + blockIdx.x, number);
    }
    __syncthreads();  // all flags are on their way before anyone waits
    int part = threadIdx.x;
    if (part < PARTS && part != e.rank) {
        const int* flag = (const int*)e.mine + part * BLOCKS + blockIdx.x;
        for (int spins = 0; read_word(flag) != number; spins++)
            if (patience.ended(part, spins)) break;
        fence();
    }
    __syncthreads();
}
struct Arriving {
    int word;

    DEV Arriving(const Exchange<Cut>& e, int64 at) : word(load_fresh((const int*)e.mine + FLAGS + at)) {}
    DEV float value(const Exchange<Cut>&, int64, int, Patience&) const { return isobit::from_bits(uint32(word)); }
};
#else
DEV void send(const Exchange<Cut>& e, int64 at, float value) { e.send(at, value); }
DEV void meet(const Exchange<Cut>&, Patience&) {
    __syncthreads();  // all of the block's words are on their way before anyone waits
}
struct Arriving {
    uint64 word;

    DEV Arriving(const Exchange<Cut>& e, int64 at) : word(read_word(e.mine + at)) {}
    DEV float value(const Exchange<Cut>& e, int64 at, int part, Patience& patience) {
        for (int spins = 0; !e.is_there(word); spins++) {
            if (patience.ended(part, spins)) break;
            word = read_word(e.mine + at);
        }
        return isobit::from_bits(uint32(word));
    }
};
#endif

// The grid is the same on all parts and runs at once, and value i of a part is sent and received by the same
// thread of it: a block waits for blocks of its own number alone.
KERNEL(WIDE) gather(const float* x, int64 stride, int step, int per_row, int vectors, const uint64* table,
                    int site, float* out) {
    Exchange<Cut> e(table, site);
    begin();
    int64 first = int64(blockIdx.x) * WIDE + threadIdx.x, all = int64(gridDim.x) * WIDE;
    View view{x, stride, step, per_row};
    Share own(e.rank, vectors);
    for (int64 i = first; i < own.count; i += all) {
        float value = view.vector(own.vector(i))[own.column(i)];
        int64 at = own.at(i);
        out[at] = value;
        send(e, at, value);
    }
    Patience patience = e.patience();
    meet(e, patience);
#pragma unroll
    for (int part = 0; part < PARTS; part++) {
        if (part == e.rank) continue;
        Share share(part, vectors);
        int64 i = first;
        for (; i + (AHEAD - 1) * all < share.count; i += AHEAD * all) {
            int64 at[AHEAD] = {share.at(i), share.at(i + all), share.at(i + 2 * all), share.at(i + 3 * all)};
            Arriving a[AHEAD] = {{e, at[0]}, {e, at[1]}, {e, at[2]}, {e, at[3]}};
#pragma unroll
            for (int k = 0; k < AHEAD; k++) out[at[k]] = a[k].value(e, at[k], part, patience);
        }
        for (; i < share.count; i += all) {
            int64 at = share.at(i);
            out[at] = Arriving(e, at).value(e, at, part, patience);
        }
    }
}
