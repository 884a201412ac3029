// Exchanges of many plain values, with a flag for all that a block of each part has sent (exchange.cuh has the others,
// whose values are words with a number). The grid is the same on all parts and runs at once: a block waits for blocks of
// its own number alone. BLOCKS: at most so many. MOVED: values at a time.
#pragma once
#include "exchange.cuh"

#if MOVED == 4
typedef float4 Values;
DEV Values load(const float* from) { return make_float4(from[0], from[1], from[2], from[3]); }
#else
typedef float Values;
DEV Values load(const float* from) { return *from; }
#endif

constexpr int FLAGS = (Cut::PARTS * BLOCKS + 3) / 4 * 4;  // words at the begin of an inbox, [PARTS][BLOCKS]

// To the same place of all others' inboxes; and what they have sent there.
DEV void send_plain(const Exchange<Cut>& e, int64 at, const Values& values) {
#pragma unroll
    for (int part = 0; part < Cut::PARTS; part++)
        if (part != e.rank) *reinterpret_cast<Values*>((float*)e.inbox[part] + FLAGS + at) = values;
}
DEV Values sent_plain(const Exchange<Cut>& e, int64 at) {
    return load_fresh(reinterpret_cast<const Values*>((const float*)e.mine + FLAGS + at));
}
// The block's values have been sent; wait for what the same block of the others sends.
DEV void meet_flagged(const Exchange<Cut>& e, Patience& patience) {
    __syncthreads();
    int number = int(e.number);
    if (threadIdx.x == 0) {
        fence();
#pragma unroll
        for (int part = 0; part < Cut::PARTS; part++)
            if (part != e.rank) write_word((int*)e.inbox[part] + e.rank * BLOCKS + blockIdx.x, number);
    }
    __syncthreads();  // all flags are on their way before anyone waits
    int part = threadIdx.x;
    if (part < Cut::PARTS && part != e.rank) {
        const int* flag = (const int*)e.mine + part * BLOCKS + blockIdx.x;
        for (int spins = 0; read_word(flag) != number; spins++)
            if (patience.ended(part, spins)) break;
        fence();
    }
    __syncthreads();
}
