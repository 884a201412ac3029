// What each part of a split model has of a value, put together on every part.
// FLAGGED: of many values, a flag says that all are there that a block sends; else each says so itself, as a
// word of twice the size (exchange.cuh). Of a vector LANES threads have MOVED values each at a time, for as many
// vectors as a block of WIDE threads has room for.
#include "flagged.cuh"
#include "views.cuh"

constexpr int PARTS = Cut::PARTS, VECTORS = WIDE / LANES;  // that a block has at a time
constexpr int AHEAD = 4;                                   // reads of a thread that are on their way together

// The thread's values of an item of the whole vector's, if a part has them.
struct WorkItem {
    int vector, column;
    bool there;

    DEV WorkItem(int item, int items, int pieces, int vectors, int width) {
        vector = item / pieces * VECTORS + int(threadIdx.x) / LANES;
        column = (item % pieces * LANES + int(threadIdx.x) % LANES) * MOVED;
        there = item < items && vector < vectors && column < width;
    }
    // Where they stand in the whole, of a part that begins there.
    DEV int64 at(int first) const { return int64(vector) * Cut::WHOLE + first + column; }
};

#ifdef FLAGGED
DEV void send(const Exchange<Cut>& e, int64 at, const Values& values) { send_plain(e, at, values); }
DEV void meet(const Exchange<Cut>& e, Patience& patience) { meet_flagged(e, patience); }
struct Arriving {
    Values values;

    DEV void ask(const Exchange<Cut>& e, int64 at) { values = sent_plain(e, at); }
    DEV Values get(const Exchange<Cut>&, int64, int, Patience&) const { return values; }
};
#else
DEV void send(const Exchange<Cut>& e, int64 at, const Values& values) { e.send(at, values); }
DEV void meet(const Exchange<Cut>&, Patience&) {
    __syncthreads();  // all of the block's words are on their way before anyone waits
}
struct Arriving {
    uint64 word;

    DEV void ask(const Exchange<Cut>& e, int64 at) { word = read_word(e.mine + at); }
    DEV Values get(const Exchange<Cut>& e, int64 at, int part, Patience&) const {
        return e.value(word, part, at);
    }
};
#endif

// The grid is the same on all parts and runs at once, and an item of a part is sent and received by the same
// block of it: a block waits for blocks of its own number alone. pieces: of LANES * MOVED columns of a vector.
KERNEL(WIDE) gather(const float* x, int64 stride, int step, int per_row, int vectors, int pieces, int items,
                    const uint64* table, int site, float* out) {
    Exchange<Cut> e(table, site);
    begin();
    View view{x, stride, step, per_row};
    for (int item = blockIdx.x; item < items; item += gridDim.x) {
        WorkItem p(item, items, pieces, vectors, e.columns);
        if (!p.there) continue;
        Values values = load(view.vector(p.vector) + p.column);
        *reinterpret_cast<Values*>(out + p.at(e.first)) = values;
        send(e, p.at(e.first), values);
    }
    Patience patience = e.patience();
    meet(e, patience);
#pragma unroll
    for (int part = 0; part < PARTS; part++) {
        if (part == e.rank) continue;
        int first = Cut::first(part), width = Cut::first(part + 1) - first;
        for (int item = blockIdx.x; item < items; item += AHEAD * gridDim.x) {
            Arriving a[AHEAD];
#pragma unroll
            for (int k = 0; k < AHEAD; k++) {
                WorkItem p(item + k * gridDim.x, items, pieces, vectors, width);
                a[k].ask(e, p.there ? p.at(first) : 0);
            }
#pragma unroll
            for (int k = 0; k < AHEAD; k++) {
                WorkItem p(item + k * gridDim.x, items, pieces, vectors, width);
                if (p.there) *reinterpret_cast<Values*>(out + p.at(first)) = a[k].get(e, p.at(first), part, patience);
            }
        }
    }
}
