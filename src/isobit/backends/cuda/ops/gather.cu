// What each part of a split model has of a value, put together on every part.
// BOUNDS: the first column of each part in the whole, then its end; RANK: this part.
#include "views.cuh"

constexpr int bounds[] = {BOUNDS};
constexpr int PARTS = sizeof(bounds) / sizeof(int) - 1;
constexpr int AHEAD = 4;      // words that a thread reads at once
#ifdef EMULATED
constexpr int SPINS = 1 << 4;  // before it looks whether to wait at all
#else
constexpr int SPINS = 1 << 12;
#endif

#ifdef EMULATED
#include <sched.h>
DEV uint64 read_word(const uint64* p) { return *(const volatile uint64*)p; }
DEV void write_word(uint64* p, uint64 v) { *(volatile uint64*)p = v; }
DEV int read_flag(const int* p) { return *(const volatile int*)p; }
DEV void write_flag(int* p, int v) { *(volatile int*)p = v; }
DEV void pause() { sched_yield(); }
#include <time.h>
DEV uint64 now() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ull + t.tv_nsec;
}
#else
// Words that other devices, or the host, write and read: whole, in any order.
DEV uint64 read_word(const uint64* p) {
    uint64 v;
    asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(v) : "l"(p) : "memory");
    return v;
}
DEV void write_word(uint64* p, uint64 v) {
    asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(p), "l"(v) : "memory");
}
DEV int read_flag(const int* p) {
    int v;
    asm volatile("ld.relaxed.sys.global.s32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}
DEV void write_flag(int* p, int v) {
    asm volatile("st.relaxed.sys.global.s32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
DEV void pause() {}
DEV uint64 now() {
    uint64 t;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(t));
    return t;
}
#endif

// How long a thread waits for words of the other parts: until the pass is given up, by a part that has
// waited too long or by the host when a device has failed. flags: in the host's memory, what the pass was
// given up for (0: it is not), and milliseconds to wait.
struct Patience {
    int* flags;
    uint64 since = 0;
    bool over = false;

    DEV bool ended(int part, int spins) {
        pause();
        if (spins % SPINS != SPINS - 1) return over;
        uint64 t = now();
        if (since == 0) since = t;
        if (t - since > 1000000ull * read_flag(flags + 1)) write_flag(flags, 1 + part);
        return over = read_flag(flags) != 0;
    }
};

// turn: how many values this program has gathered, and blocks that are done with this one. inboxes:
// [2][PARTS] addresses, then that of the flags; every device writes its values to all of them, each with the
// turn's number, which says that it is there. Two inboxes take turns: who writes to one has got all values of
// the turn between, so everyone has read it. The grid is the same on all parts, and word i of a part is
// written and read by the same thread of it: a block waits for blocks of its own number alone.
KERNEL(THREADS) gather(const float* x, int64 stride, int step, int per_row, int vectors, int* turn,
                       const uint64* inboxes, float* out) {
    begin();
    constexpr int whole = bounds[PARTS], own = bounds[RANK + 1] - bounds[RANK];
    int number = load_fresh(turn) % (1 << 30) + 1;
    const uint64* to = inboxes + (number & 1) * PARTS;
    int64 first = int64(blockIdx.x) * THREADS + threadIdx.x, all = int64(gridDim.x) * THREADS;
    View view{x, stride, step, per_row};
    for (int64 i = first; i < int64(vectors) * own; i += all) {
        int vector = int(i / own), column = int(i % own);
        float value = view.vector(vector)[column];
        int64 at = int64(vector) * whole + bounds[RANK] + column;
        out[at] = value;
        uint64 word = uint64(uint32(number)) << 32 | bits(value);
#pragma unroll
        for (int part = 0; part < PARTS; part++)
            if (part != RANK) write_word((uint64*)to[part] + at, word);
    }
    __syncthreads();  // all of the block's words are on their way before anyone waits
    const uint64* mine = (const uint64*)to[RANK];
    Patience patience{(int*)inboxes[2 * PARTS]};
#pragma unroll
    for (int part = 0; part < PARTS; part++) {
        if (part == RANK) continue;
        int n = bounds[part + 1] - bounds[part];
        for (int64 i = first; i < int64(vectors) * n; i += AHEAD * all) {
            uint64 word[AHEAD];
            int64 at[AHEAD];
#pragma unroll
            for (int k = 0; k < AHEAD; k++) {
                int64 j = min(i + k * all, i + (int64(vectors) * n - 1 - i) / all * all);
                at[k] = j / n * whole + bounds[part] + j % n;
                word[k] = read_word(mine + at[k]);
            }
#pragma unroll
            for (int k = 0; k < AHEAD; k++) {
                for (int spins = 0; uint32(word[k] >> 32) != uint32(number); spins++) {
                    if (patience.ended(part, spins)) break;
                    word[k] = read_word(mine + at[k]);
                }
                out[at[k]] = isobit::from_bits(uint32(word[k]));
            }
        }
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        if (atomicAdd(turn + 1, 1) == int(gridDim.x) - 1) {
            turn[1] = 0;
            turn[0] = number;
        }
    }
}
