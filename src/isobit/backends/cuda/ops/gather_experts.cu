// Rows [vectors][n * MOVED] of the outputs of experts, of which each part of a split model has those of its own
// experts: all of them, on every part, where this part's are. BOUNDS: the first expert of each part.
#include "flagged.cuh"

// ids: the expert of each row, the same on all parts.
KERNEL(THREADS) gather_experts(float* rows, const int* ids, int vectors, int n, const uint64* table, int site) {
    Exchange<Cut> e(table, site);
    begin();
    for (int v = blockIdx.x; v < vectors; v += gridDim.x) {
        if (Cut::part_of(ids[v]) != e.rank) continue;
        for (int i = threadIdx.x; i < n; i += THREADS) {
            int64 at = (int64(v) * n + i) * MOVED;
            send_plain(e, at, *reinterpret_cast<const Values*>(rows + at));
        }
    }
    Patience patience = e.patience();
    meet_flagged(e, patience);
    for (int v = blockIdx.x; v < vectors; v += gridDim.x) {
        if (Cut::part_of(ids[v]) == e.rank) continue;
        for (int i = threadIdx.x; i < n; i += THREADS) {
            int64 at = (int64(v) * n + i) * MOVED;
            *reinterpret_cast<Values*>(rows + at) = sent_plain(e, at);
        }
    }
}
