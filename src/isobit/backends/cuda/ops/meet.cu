// A value lies in all parts' inboxes as a whole (Mirrors of exchange.cuh) once all of them have come here: what the
// kernels ahead of this one have stored is there for those behind it, on every part.
#include "exchange.cuh"

// BLOCKS: flags that each part has in an inbox, of which this uses the first.
KERNEL(32) meet(const uint64* exchanges, int site) {
    Exchange<Cut> e(exchanges, site);
    begin();
    if (threadIdx.x) return;
    int number = int(e.number);
    fence();
#pragma unroll
    for (int part = 0; part < Cut::PARTS; part++)
        if (part != e.rank) write_word((int*)e.inbox[part] + e.rank * BLOCKS, number);
    Patience patience = e.patience();
    for (int part = 0; part < Cut::PARTS; part++) {
        if (part == e.rank) continue;
        const int* flag = (const int*)e.mine + part * BLOCKS;
        for (int spins = 0; read_word(flag) != number; spins++)
            if (patience.ended(part, spins)) break;
    }
    fence();
}
