// Values of which each part of a split model makes some columns, and of which every part reads all: how parts
// on other devices get them.
//
// A value crosses as a word of twice its size, with the number of the exchange: whoever finds the number has
// the value. Every part has an inbox, of two halves that exchanges use in turn, and sends its own values to
// all others' inboxes. Numbers count the exchanges of a program (exchanges.cu), on all parts alike; before one
// comes again, inboxes are emptied (parts.py).
//
// No word is overwritten before it was read. Exchange n + 2 writes where n did. A part sends values of n + 2
// once it has got all values of n + 1, which every other part sends once it has read all of n. For this, every
// part sends some values of each exchange; and what of n is read, is read by kernels ahead of the one that
// sends n + 1, or by blocks of this one that send some of it themselves, afterwards.
//
// Nobody waits in a circle. What a kernel waits for is sent by the same kernel, whose blocks then all run at
// once and send before they wait, or by kernels ahead of it, which wait for nothing that comes later.
#pragma once
#include "mirrors.cuh"

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
DEV void read_pair(const uint64* p, uint64& a, uint64& b) { a = read_word(p), b = read_word(p + 1); }
DEV void write_pair(uint64* p, uint64 a, uint64 b) { write_word(p, a), write_word(p + 1, b); }
DEV void fence() {}
DEV void pause() {
    emu::progress++;  // of another device
    sched_yield();
    emu::yield();
}
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
DEV void read_pair(const uint64* p, uint64& a, uint64& b) {
    asm volatile("ld.relaxed.sys.global.v2.u64 {%0, %1}, [%2];" : "=l"(a), "=l"(b) : "l"(p) : "memory");
}
DEV void write_pair(uint64* p, uint64 a, uint64 b) {
    asm volatile("st.relaxed.sys.global.v2.u64 [%0], {%1, %2};" ::"l"(p), "l"(a), "l"(b) : "memory");
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

// Which columns of a value each part has: the first of each part, then the end of the last.
template <int... FIRST>
struct ColumnCut {
    static constexpr int PARTS = sizeof...(FIRST) - 1;
    static constexpr int WHOLE = ((FIRST), ...), SUPERS = (WHOLE + SUPER - 1) / SUPER;  // its columns

    DEV static int first(int part) {
        int i = 0, found = 0;
        ((found = i++ == part ? FIRST : found), ...);
        return found;
    }
    DEV static int part_of(int column) {
        int i = -1;
        ((i += column >= FIRST), ...);
        return i;
    }
};

// One exchange of a value: site says which of the pass's. In an inbox a vector begins at a multiple of SUPER.
template <class Cut>
struct Exchange {
    static constexpr int PARTS = Cut::PARTS;
    uint64 *inbox[PARTS], *mine;
    int rank, first, columns;  // this part, its first column, and how many it has
    uint32 number;
    int* flags;

    // What it reads is there before any kernel of the pass begins (exchanges.cu).
    DEV Exchange(const uint64* host, int site) {
        auto table = (const ExchangeTable<PARTS>*)host;
        number = load_fresh(&table->count) + site;
        rank = int(table->rank), flags = table->flags;
        first = Cut::first(rank), columns = Cut::first(rank + 1) - first;
        int64 from = number & 1 ? table->half : 0;
#pragma unroll
        for (int part = 0; part < PARTS; part++) inbox[part] = (uint64*)table->inbox[part] + from;
        mine = (uint64*)table->inbox[rank] + from;
    }
    DEV Patience patience() const { return {flags}; }
    DEV uint64 word(float v) const { return uint64(number) << 32 | bits(v); }
    DEV bool is_there(uint64 word) const { return uint32(word >> 32) == number; }
    // The first word of a superblock, counted over all vectors.
    DEV static int64 at(int64 vector, int super) { return (vector * Cut::SUPERS + super) * SUPER; }

    // One value to all others.
    DEV void send(int64 at, float v) const {
#pragma unroll
        for (int part = 0; part < PARTS; part++)
            if (part != rank) write_word(inbox[part] + at, word(v));
    }
    // The value that was sent there; w: what was there before.
    DEV float value(uint64 w, int part, int64 at) const {
        Patience waits = patience();
        for (int spins = 0; !is_there(w) && !waits.ended(part, spins); spins++) w = read_word(mine + at);
        return isobit::from_bits(uint32(w));
    }

    // Eight columns from 8 * lane on of the superblock that begins at `at`. IN_ORDER: words lie as the columns do,
    // else so that what a warp moves at once lies in one piece.
    template <bool IN_ORDER>
    DEV static int pair(int i) {
        return IN_ORDER ? 8 * lane_id() + 2 * i : 2 * WARP * i + 2 * lane_id();
    }
    template <bool IN_ORDER>
    DEV void send8(int64 at, const float (&v)[8]) const {
#pragma unroll
        for (int part = 0; part < PARTS; part++)
            if (part != rank)
#pragma unroll
                for (int i = 0; i < 4; i++)
                    write_pair(inbox[part] + at + pair<IN_ORDER>(i), word(v[2 * i]), word(v[2 * i + 1]));
    }
    // What was sent there is asked for before anything is waited for.
    struct Asked {
        uint64 w[8];
    };
    template <bool IN_ORDER>
    DEV void ask8(int64 at, Asked& asked) const {
#pragma unroll
        for (int i = 0; i < 4; i++) read_pair(mine + at + pair<IN_ORDER>(i), asked.w[2 * i], asked.w[2 * i + 1]);
    }
    template <bool IN_ORDER>
    DEV void take8(int part, int64 at, Asked& asked, float (&v)[8]) const {
        uint64(&w)[8] = asked.w;
        Patience waits = patience();
        for (int spins = 0;; spins++) {
            bool all = true;
#pragma unroll
            for (int i = 0; i < 8; i++) all &= is_there(w[i]);
            if (all || waits.ended(part, spins)) break;
#pragma unroll
            for (int i = 0; i < 4; i++)
                if (!(is_there(w[2 * i]) && is_there(w[2 * i + 1])))
                    read_pair(mine + at + pair<IN_ORDER>(i), w[2 * i], w[2 * i + 1]);
        }
#pragma unroll
        for (int i = 0; i < 8; i++) v[i] = isobit::from_bits(uint32(w[i]));
    }
    template <bool IN_ORDER>
    DEV void receive8(int part, int64 at, float (&v)[8]) const {
        Asked asked;
        ask8<IN_ORDER>(at, asked);
        take8<IN_ORDER>(part, at, asked, v);
    }
    // The same of superblock s of a vector whose columns on this part are `here`, and which was sent IN_ORDER;
    // what lies behind the last column is 0.
    DEV void ask_super(const float* here, int64 vector, int s, Asked& asked, float (&v)[8]) const {
        int column = s * SUPER + 8 * lane_id(), part = Cut::part_of(column);
#pragma unroll
        for (int i = 0; i < 8; i++) v[i] = 0.0f;
        if (part != rank && part < PARTS) ask8<true>(at(vector, s), asked);
        if (part == rank) load8(here + column - first, 8, v);
    }
    DEV void take_super(int64 vector, int s, Asked& asked, float (&v)[8]) const {
        int part = Cut::part_of(s * SUPER + 8 * lane_id());
        if (part != rank && part < PARTS) take8<true>(part, at(vector, s), asked, v);
        __syncwarp();
    }
    DEV void load_super(const float* here, int64 vector, int s, float (&v)[8]) const {
        Asked asked;
        ask_super(here, vector, s, asked, v);
        take_super(vector, s, asked, v);
    }
};

// Of values that are here as a whole there are none.
struct Whole {};
template <>
struct Exchange<Whole> {
    static constexpr int first = 0;
    DEV Exchange(const uint64*, int) {}
    DEV static int64 at(int64, int) { return 0; }
    DEV void send(int64, float) const {}
};

// Bounds of a ColumnCut: of the value that a kernel reads, and of the one that it makes.
#ifdef BOUNDS
typedef ColumnCut<BOUNDS> Cut;
#else
typedef Whole Cut;
#endif
#ifdef SENT_BOUNDS
typedef ColumnCut<SENT_BOUNDS> SentCut;
#else
typedef Whole SentCut;
#endif
