// What each part of a split model has of a value, put together on every part.
// BOUNDS: the first column of each part in the whole, then its end; RANK: this part. FLAGGED: of many values,
// a flag says that all are there that a block sends; else each says so itself, as a word of twice the size.
// BLOCKS: at most so many, of WIDE threads.
#include "views.cuh"

constexpr int bounds[] = {BOUNDS};
constexpr int PARTS = sizeof(bounds) / sizeof(int) - 1;
constexpr int AHEAD = 4;  // values that a thread reads at once

#ifdef EMULATED
#include <sched.h>
#include <time.h>
constexpr int SPINS = 1 << 4;  // before a thread looks whether to wait at all
template <class T>
DEV T read_word(const T* p) {
    return *(const volatile T*)p;
}
template <class T>
DEV void write_word(T* p, T v) {
    *(volatile T*)p = v;
}
DEV void fence() {}
DEV void pause() { sched_yield(); }
DEV uint64 now() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ull + t.tv_nsec;
}
#else
constexpr int SPINS = 1 << 12;
// Words that other devices, or the host, write and read: whole, in any order.
DEV uint64 read_word(const uint64* p) {
    uint64 v;
    asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(v) : "l"(p) : "memory");
    return v;
}
DEV void write_word(uint64* p, uint64 v) {
    asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(p), "l"(v) : "memory");
}
DEV int read_word(const int* p) {
    int v;
    asm volatile("ld.relaxed.sys.global.s32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}
DEV void write_word(int* p, int v) {
    asm volatile("st.relaxed.sys.global.s32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
DEV void fence() { __threadfence_system(); }
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
        if (t - since > 1000000ull * read_word(flags + 1)) write_word(flags, 1 + part);
        return over = read_word(flags) != 0;
    }
};

// Value i of a part, of so many vectors.
struct Share {
    int first, width;
    int64 count;

    DEV Share(int part, int vectors)
        : first(bounds[part]), width(bounds[part + 1] - bounds[part]), count(int64(vectors) * width) {}
    DEV int vector(int64 i) const { return int(i / width); }
    DEV int column(int64 i) const { return int(i % width); }
    // Where it stands in the whole.
    DEV int64 at(int64 i) const { return int64(vector(i)) * bounds[PARTS] + first + column(i); }
};

#ifdef FLAGGED
constexpr int FLAGS = PARTS * BLOCKS;  // words at the begin of an inbox, [PARTS][BLOCKS]
DEV void send(uint64 inbox, int64 at, float value, int) { write_word((int*)inbox + FLAGS + at, int(bits(value))); }
// The block's values have been sent; wait for what the same block of the others sends.
DEV void meet(const uint64* to, int number, Patience& patience) {
    __syncthreads();
    int part = threadIdx.x;
    bool meets = part < PARTS && part != RANK;
    if (meets) {
        fence();
        write_word((int*)to[part] + RANK * BLOCKS + blockIdx.x, number);
    }
    __syncthreads();  // all flags are on their way before anyone waits
    if (meets) {
        const int* flag = (const int*)to[RANK] + part * BLOCKS + blockIdx.x;
        for (int spins = 0; read_word(flag) != number; spins++)
            if (patience.ended(part, spins)) break;
        fence();
    }
    __syncthreads();
}
struct Arriving {
    int word;

    DEV Arriving(uint64 inbox, int64 at) : word(load_fresh((const int*)inbox + FLAGS + at)) {}
    DEV float value(uint64, int64, int, int, Patience&) const { return isobit::from_bits(uint32(word)); }
};
#else
DEV void send(uint64 inbox, int64 at, float value, int number) {
    write_word((uint64*)inbox + at, uint64(uint32(number)) << 32 | bits(value));
}
DEV void meet(const uint64*, int, Patience&) {
    __syncthreads();  // all of the block's words are on their way before anyone waits
}
struct Arriving {
    uint64 word;

    DEV Arriving(uint64 inbox, int64 at) : word(read_word((const uint64*)inbox + at)) {}
    DEV float value(uint64 inbox, int64 at, int part, int number, Patience& patience) {
        for (int spins = 0; int(word >> 32) != number; spins++) {
            if (patience.ended(part, spins)) break;
            word = read_word((const uint64*)inbox + at);
        }
        return isobit::from_bits(uint32(word));
    }
};
#endif

// round: how many values this program has gathered, and blocks that are done with this one. inboxes:
// [2][PARTS] addresses, then that of the flags of the pass; every device sends its values to all others, each
// or all with the round's number, which says that it is there. Two inboxes take turns: who writes to one has
// got all values of the round between, so everyone has read it. The grid is the same on all parts, and value i
// of a part is sent and received by the same thread of it: a block waits for blocks of its own number alone.
KERNEL(WIDE) gather(const float* x, int64 stride, int step, int per_row, int vectors, int* round,
                       const uint64* inboxes, float* out) {
    begin();
    int number = load_fresh(round) % (1 << 30) + 1;
    const uint64* to = inboxes + (number & 1) * PARTS;
    int64 first = int64(blockIdx.x) * WIDE + threadIdx.x, all = int64(gridDim.x) * WIDE;
    View view{x, stride, step, per_row};
    Share own(RANK, vectors);
    for (int64 i = first; i < own.count; i += all) {
        float value = view.vector(own.vector(i))[own.column(i)];
        int64 at = own.at(i);
        out[at] = value;
#pragma unroll
        for (int part = 0; part < PARTS; part++)
            if (part != RANK) send(to[part], at, value, number);
    }
    Patience patience{(int*)inboxes[2 * PARTS]};
    meet(to, number, patience);
#pragma unroll
    for (int part = 0; part < PARTS; part++) {
        if (part == RANK) continue;
        Share share(part, vectors);
        int64 i = first;
        for (; i + (AHEAD - 1) * all < share.count; i += AHEAD * all) {
            int64 at[AHEAD] = {share.at(i), share.at(i + all), share.at(i + 2 * all), share.at(i + 3 * all)};
            Arriving a[AHEAD] = {{to[RANK], at[0]}, {to[RANK], at[1]}, {to[RANK], at[2]}, {to[RANK], at[3]}};
#pragma unroll
            for (int k = 0; k < AHEAD; k++) out[at[k]] = a[k].value(to[RANK], at[k], part, number, patience);
        }
        for (; i < share.count; i += all) {
            int64 at = share.at(i);
            out[at] = Arriving(to[RANK], at).value(to[RANK], at, part, number, patience);
        }
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        if (atomicAdd(round + 1, 1) == int(gridDim.x) - 1) {
            round[1] = 0;
            round[0] = number;
        }
    }
}
