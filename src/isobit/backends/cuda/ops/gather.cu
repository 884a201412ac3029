// What each part of a split model has of a value, put together on every part.
// BOUNDS: the first column of each part in the whole, then its end; RANK: this part.
#include "views.cuh"

constexpr int bounds[] = {BOUNDS};
constexpr int PARTS = sizeof(bounds) / sizeof(int) - 1;

#ifdef EMULATED
#include <sched.h>
DEV uint64 read_word(const uint64* p) { return *(const volatile uint64*)p; }
DEV void write_word(uint64* p, uint64 v) { *(volatile uint64*)p = v; }
DEV bool too_long(uint64) { return sched_yield(), false; }
DEV uint64 now() { return 0; }
#else
// Words that other devices write and read: whole, in any order.
DEV uint64 read_word(const uint64* p) {
    uint64 v;
    asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(v) : "l"(p) : "memory");
    return v;
}
DEV void write_word(uint64* p, uint64 v) {
    asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(p), "l"(v) : "memory");
}
DEV uint64 now() {
    uint64 t;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(t));
    return t;
}
DEV bool too_long(uint64 since) { return now() - since > 20000000000ull; }  // 20 s: a device is lost
#endif

// A block: THREADS columns of each part, of one vector. turn: how many values this program has
// gathered, and blocks that are done with this one. inboxes: [2][PARTS] addresses; every device writes
// its values to all of them, each with the turn's number, which says that it is there. Two inboxes take
// turns: who writes to one has got all values of the turn between, so everyone has read it.
KERNEL(THREADS) gather(const float* x, int64 stride, int step, int per_row, int n, int* turn,
                       const uint64* inboxes, float* out) {
    begin();
    constexpr int whole = bounds[PARTS];
    int column = blockIdx.y * THREADS + threadIdx.x;
    int64 vector = blockIdx.x;
    int number = turn[0] + 1;
    const uint64* to = inboxes + (number & 1) * PARTS;
    if (column < n) {
        float value = View{x, stride, step, per_row}.vector(vector)[column];
        int64 at = vector * whole + bounds[RANK] + column;
        out[at] = value;
        uint64 word = uint64(uint32(number)) << 32 | bits(value);
#pragma unroll
        for (int part = 0; part < PARTS; part++)
            if (part != RANK) write_word((uint64*)to[part] + at, word);
    }
    __syncthreads();  // all of the block's words are on their way before anyone waits
    const uint64* mine = (const uint64*)to[RANK];
    uint64 since = now();
#pragma unroll
    for (int part = 0; part < PARTS; part++) {
        if (part == RANK || column >= bounds[part + 1] - bounds[part]) continue;
        int64 at = vector * whole + bounds[part] + column;
        uint64 word;
        while (uint32((word = read_word(mine + at)) >> 32) != uint32(number))
            if (too_long(since)) {
#ifndef EMULATED
                __trap();
#endif
            }
        out[at] = isobit::from_bits(uint32(word));
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        if (atomicAdd(turn + 1, 1) == int(gridDim.x * gridDim.y) - 1) {
            turn[1] = 0;
            turn[0] = number;
        }
    }
}
