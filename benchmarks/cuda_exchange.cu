// What it costs the blocks of a decode step to hand one another a few KB while weights stream past.
//
// WORDS words belong to the blocks of a grid, or of a cluster, in equal parts. In a round each block
// takes all words, adds them up with a factor each, and makes its words of the next round from the
// sum: a word that is stale, missing or misplaced changes all that follow, and the host knows the sums.
// Every wait for a word is bounded.
//
// METHOD: how words are known to have come. OWN: bytes of weights that a block fetches for each round.
// CLUSTER: blocks of a cluster, or 1.
#include "copy.cuh"

constexpr int BLOCK = 512, WARPS = BLOCK / WARP, BLOCKS = 128, MOST_POLLS = 1 << 14;
constexpr int QUADS = WORDS / 4, EACH = (QUADS + BLOCK - 1) / BLOCK;
constexpr int SHARERS = WITHIN ? CLUSTER : BLOCKS;  // blocks that share the words
constexpr int MINE = WORDS / SHARERS, THREES = (MINE + 2) / 3;
constexpr uint32 NOT_YET = 0xffffffffu, SEED = 12345;
static_assert(WORDS % SHARERS == 0 && WORDS % 4 == 0 && (!WITHIN || MINE % 4 == 0), "whole parts");
#if CLUSTER > 1
#define CLUSTERED __cluster_dims__(CLUSTER, 1, 1)
#else
#define CLUSTERED
#endif

enum {
    PLAIN,    // by the end of the kernel ahead
    TAG8,     // a tag beside each word
    TAG16,    // a tag beside three words
    UNLIKE,   // by being unlike NOT_YET
    FLAGS,    // a flag of each block
    COUNTER,  // one counter of all
    RELAY,    // a tag beside each word; a cluster's blocks share the looking and hand on what they find
    ALONE,    // every block makes all words itself: what a round costs without an exchange
    BARRIER,  // within a cluster: words pushed to all blocks, then its barrier
    PULL,     // its barrier, then words are read where they were made
    ASYNC,    // words pushed so that they count themselves at an arrival
};
constexpr int RING = METHOD == UNLIKE ? 4 : 2;  // buffers in turn, of 4 * WORDS words each

struct Shared {
    uint32 part[2][WARPS];
    uint64 came[2], arrival[2];  // of words, of weights
    int failed;
    __align__(16) uint32 words[2][WORDS];
    __align__(128) uint8 weights[2][OWN ? OWN : 16];
};

DEV uint32 value(uint32 sum, int i) {
    uint32 x = (sum + uint32(i) * 0x9e3779b9u) * 0x85ebca6bu;
    x = (x ^ x >> 15) * 0xc2b2ae35u;
    return (x ^ x >> 13) & 0x7fffffffu;
}
DEV uint4 value4(uint32 sum, int i) {
    return make_uint4(value(sum, i), value(sum, i + 1), value(sum, i + 2), value(sum, i + 3));
}
DEV uint32 weighed(uint32 word, int i) { return word * uint32(2 * i + 1); }
DEV uint32 weighed4(uint4 v, int i) {
    return weighed(v.x, i) + weighed(v.y, i + 1) + weighed(v.z, i + 2) + weighed(v.w, i + 3);
}
DEV uint32 block_sum(uint32 v, int round, Shared* sh) {
    uint32* part = sh->part[round % 2];
    v = uint32(warp_sum(int(v)));
    if (lane_id() == 0) part[warp_id()] = v;
    __syncthreads();
    return uint32(warp_sum(lane_id() < WARPS ? int(part[lane_id()]) : 0));
}

DEV uint4 load4(const uint32* p) {
    uint4 v;
    asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
    return v;
}
DEV ulonglong2 load_two(const uint32* p) {
    ulonglong2 v;
    asm volatile("ld.relaxed.gpu.global.v2.u64 {%0, %1}, [%2];"
                 : "=l"(v.x), "=l"(v.y) : "l"(p) : "memory");
    return v;
}
DEV ulonglong2 load_whole(const uint32* p) {
    ulonglong2 v;
    asm volatile("{\n.reg .b128 t;\nld.relaxed.gpu.global.b128 t, [%2];\nmov.b128 {%0, %1}, t;\n}"
                 : "=l"(v.x), "=l"(v.y) : "l"(p) : "memory");
    return v;
}
DEV void store_whole(uint32* p, uint64 low, uint64 high) {
    asm volatile("{\n.reg .b128 t;\nmov.b128 t, {%1, %2};\nst.relaxed.gpu.global.b128 [%0], t;\n}"
                 ::"l"(p), "l"(low), "l"(high) : "memory");
}
DEV uint32 load_acquire(const uint32* p) {
    uint32 v;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}
DEV void store_word(uint32* p, uint32 v) {
    asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
DEV void store_release(uint32* p, uint32 v) {
    asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
DEV void add_release(uint32* p) {
    asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(p) : "memory");
}

DEV int rank() {
    int r;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
    return r;
}
DEV SharedAddress at_rank(const void* p, int r) {
    SharedAddress a;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(a) : "r"(shared_address(p)), "r"(r));
    return a;
}
DEV void cluster_arrive() {
    __syncwarp();
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
DEV void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
DEV void push(SharedAddress to, uint4 v) {
    asm volatile("st.shared::cluster.v4.u32 [%0], {%1, %2, %3, %4};"
                 ::"r"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
DEV void push_async(SharedAddress to, uint4 v, SharedAddress came) {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 "
                 "[%0], {%1, %2, %3, %4}, [%5];"
                 ::"r"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w), "r"(came) : "memory");
}
DEV uint4 pull(SharedAddress from) {
    uint4 v;
    asm volatile("ld.shared::cluster.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(from) : "memory");
    return v;
}
DEV bool has_come(Arrival* a, int phase) {
    int there;
    asm volatile("{\n.reg .pred p;\n"
                 "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2, 1000;\n"
                 "selp.b32 %0, 1, 0, p;\n}"
                 : "=r"(there) : "r"(shared_address(a)), "r"(phase & 1) : "memory");
    return there;
}
template <class Ready>
DEV void wait_until(Shared* sh, Ready ready) {
    int i = 0;
    while (!ready() && i < MOST_POLLS) i++;
    if (i == MOST_POLLS) sh->failed = 1;
}

// The block's words of a round, once `sum` of the one before is known.
DEV void publish(uint32* words, uint32* flags, int round, uint32 tag, uint32 sum, Shared* sh) {
    int t = threadIdx.x, first = (WITHIN ? rank() : blockIdx.x) * MINE;
    uint32* to = words + round % RING * (4 * WORDS);
    if (METHOD == PLAIN || METHOD == FLAGS || METHOD == COUNTER) {
        if (t < MINE) store_word(to + first + t, value(sum, first + t));
        if (METHOD == PLAIN || warp_id() != 0) return;
        static_assert((METHOD != FLAGS && METHOD != COUNTER) || MINE <= WARP, "one warp publishes");
        __syncwarp();
        if (t == 0 && METHOD == FLAGS) store_release(flags + blockIdx.x, tag);
        if (t == 0 && METHOD == COUNTER) add_release(flags + BLOCKS);
    } else if (METHOD == TAG8 || METHOD == RELAY) {
        if (t < MINE)
            store_relaxed(reinterpret_cast<uint64*>(to) + first + t,
                          uint64(tag) << 32 | value(sum, first + t));
    } else if (METHOD == TAG16) {
        int i = first + 3 * t;
        if (t < THREES)
            store_whole(to + (blockIdx.x * THREES + t) * 4, uint64(value(sum, i + 1)) << 32 | value(sum, i),
                        uint64(tag) << 32 | value(sum, i + 2));
    } else if (METHOD == UNLIKE) {
        if (t < MINE) store_word(to + first + t, value(sum, first + t));
        // Of the round before the last: all have taken it, and it is not looked at before the next but one.
        if (t >= BLOCK / 2 && t - BLOCK / 2 < MINE) {
            store_word(words + (round + 2) % RING * (4 * WORDS) + first + t - BLOCK / 2, NOT_YET);
            __threadfence();
        }
    } else if (METHOD == BARRIER || METHOD == ASYNC) {
        for (int i = t; i < MINE / 4 * CLUSTER; i += BLOCK) {
            int at = first + i % (MINE / 4) * 4, r = i / (MINE / 4);
            uint4 v = value4(sum, at);
            SharedAddress there = at_rank(&sh->words[round % 2][at], r);
            if (METHOD == BARRIER) push(there, v);
            else push_async(there, v, at_rank(&sh->came[round % 2], r));
        }
    } else if (METHOD == PULL) {
        if (t < MINE) sh->words[round % 2][first + t] = value(sum, first + t);
    }
}

// The thread's part of the sum of a round's words.
DEV uint32 take(const uint32* words, const uint32* flags, int round, uint32 tag, uint32 sum, Shared* sh) {
    int t = threadIdx.x;
    uint32 part = 0;
    const uint32* from = words + round % RING * (4 * WORDS);
    if (METHOD == ALONE) {
        for (int q = t; q < QUADS; q += BLOCK) part += weighed4(value4(sum, 4 * q), 4 * q);
    } else if (METHOD == PLAIN || METHOD == FLAGS || METHOD == COUNTER) {
        if (METHOD == FLAGS) {
            if (t < BLOCKS) wait_until(sh, [&] { return int(load_acquire(flags + t) - tag) >= 0; });
            __syncthreads();
        } else if (METHOD == COUNTER) {
            if (t == 0)
                wait_until(sh, [&] { return load_acquire(flags + BLOCKS) >= uint32(round + 1) * BLOCKS; });
            __syncthreads();
        }
        uint4 v[EACH];
#pragma unroll
        for (int e = 0; e < EACH; e++)
            if (t + e * BLOCK < QUADS) v[e] = load4(from + 4 * (t + e * BLOCK));
#pragma unroll
        for (int e = 0; e < EACH; e++)
            if (t + e * BLOCK < QUADS) part += weighed4(v[e], 4 * (t + e * BLOCK));
    } else if (METHOD == UNLIKE) {
        uint4 v[EACH];
        wait_until(sh, [&] {
            bool all = true;
#pragma unroll
            for (int e = 0; e < EACH; e++)
                if (t + e * BLOCK < QUADS) v[e] = load4(from + 4 * (t + e * BLOCK));
#pragma unroll
            for (int e = 0; e < EACH; e++)
                if (t + e * BLOCK < QUADS)
                    all &= v[e].x != NOT_YET && v[e].y != NOT_YET && v[e].z != NOT_YET && v[e].w != NOT_YET;
            return all;
        });
#pragma unroll
        for (int e = 0; e < EACH; e++)
            if (t + e * BLOCK < QUADS) part += weighed4(v[e], 4 * (t + e * BLOCK));
    } else if (METHOD == TAG8) {
        ulonglong2 v[2 * EACH];  // two words each
        constexpr int PAIRS = WORDS / 2;
        wait_until(sh, [&] {
            bool all = true;
#pragma unroll
            for (int e = 0; e < 2 * EACH; e++)
                if (t + e * BLOCK < PAIRS) v[e] = load_two(from + 4 * (t + e * BLOCK));
#pragma unroll
            for (int e = 0; e < 2 * EACH; e++)
                if (t + e * BLOCK < PAIRS) all &= uint32(v[e].x >> 32) == tag && uint32(v[e].y >> 32) == tag;
            return all;
        });
#pragma unroll
        for (int e = 0; e < 2 * EACH; e++) {
            int i = 2 * (t + e * BLOCK);
            if (i < WORDS) part += weighed(uint32(v[e].x), i) + weighed(uint32(v[e].y), i + 1);
        }
    } else if (METHOD == TAG16) {
        constexpr int ALL = THREES * BLOCKS, N = (ALL + BLOCK - 1) / BLOCK;
        ulonglong2 v[N];
        wait_until(sh, [&] {
            bool all = true;
#pragma unroll
            for (int e = 0; e < N; e++)
                if (t + e * BLOCK < ALL) v[e] = load_whole(from + 4 * (t + e * BLOCK));
#pragma unroll
            for (int e = 0; e < N; e++)
                if (t + e * BLOCK < ALL) all &= uint32(v[e].y >> 32) == tag;
            return all;
        });
#pragma unroll
        for (int e = 0; e < N; e++) {
            int at = t + e * BLOCK, k = at % THREES * 3, i = at / THREES * MINE + k;
            if (at < ALL) {
                part += weighed(uint32(v[e].x), i);
                if (k + 1 < MINE) part += weighed(uint32(v[e].x >> 32), i + 1);
                if (k + 2 < MINE) part += weighed(uint32(v[e].y), i + 2);
            }
        }
    } else if (METHOD == RELAY) {
        // The rank's quads, each by as many lanes as there are blocks to hand it to.
        for (int i = t; i < QUADS; i += BLOCK) {
            int q = rank() * (QUADS / CLUSTER) + i / CLUSTER, r = i % CLUSTER;
            ulonglong2 a, b;
            wait_until(sh, [&] {
                a = load_two(from + 8 * q), b = load_two(from + 8 * q + 4);
                return uint32(a.x >> 32) == tag && uint32(a.y >> 32) == tag && uint32(b.x >> 32) == tag &&
                       uint32(b.y >> 32) == tag;
            });
            push_async(at_rank(&sh->words[round % 2][4 * q], r),
                       make_uint4(uint32(a.x), uint32(a.y), uint32(b.x), uint32(b.y)),
                       at_rank(&sh->came[round % 2], r));
        }
    }
    if (METHOD == RELAY || METHOD == ASYNC)
        wait_until(sh, [&] { return has_come(&sh->came[round % 2], round / 2); });
    if (METHOD == BARRIER || METHOD == PULL) cluster_arrive(), cluster_wait();
    if (METHOD == RELAY || METHOD == ASYNC || METHOD == BARRIER)
        for (int q = t; q < QUADS; q += BLOCK)
            part += weighed4(*reinterpret_cast<const uint4*>(&sh->words[round % 2][4 * q]), 4 * q);
    if (METHOD == PULL)
        for (int q = t; q < QUADS; q += BLOCK)
            part += weighed4(pull(at_rank(&sh->words[round % 2][4 * q], 4 * q / MINE)), 4 * q);
    return part;
}
DEV void expect_words(int round, Shared* sh) {
    if ((METHOD == RELAY || METHOD == ASYNC) && threadIdx.x == 0)
        arrival_expect(&sh->came[round % 2], 4 * WORDS);
}
DEV void prepare(Shared* sh) {
    if (threadIdx.x < 2) arrival_init(&sh->came[threadIdx.x]), arrival_init(&sh->arrival[threadIdx.x]);
    if (threadIdx.x == 0) sh->failed = 0;
    __syncthreads();
}
// A block's weights of a round, in pieces of 8 KB at most; by one thread.
DEV void fetch(const uint8* weights, int64 bytes, int64 round, int which, Shared* sh) {
    if (OWN == 0 || threadIdx.x) return;
    arrival_expect(&sh->arrival[which], OWN);
    const uint8* from = weights + (round * BLOCKS + blockIdx.x) * OWN % (bytes - OWN) / 128 * 128;
    for (int i = 0; i < OWN; i += 8192)
        copy_bulk(sh->weights[which] + i, from + i, OWN - i < 8192 ? OWN - i : 8192, &sh->arrival[which]);
}

// Round 0's words, before anything is timed.
KERNEL(512) first(uint32* words, uint32* flags, const uint32* base) {
    DYNAMIC_SHARED(Shared, sh);
    if (WITHIN || METHOD == ALONE) return;
    if (METHOD == UNLIKE)
        for (int r = 1; r < RING; r++)
            if (threadIdx.x < MINE) words[r * 4 * WORDS + blockIdx.x * MINE + threadIdx.x] = NOT_YET;
    publish(words, flags, 0, *base, SEED, sh);
}

// Many rounds in one kernel, all of whose blocks run at once.
extern "C" __global__ void CLUSTERED __launch_bounds__(512, 1)
rounds(uint32* words, uint32* flags, const uint32* base, const uint8* weights, int64 bytes, int n,
       uint32* sums, int* failed) {
    DYNAMIC_SHARED(Shared, sh);
    prepare(sh);
    uint32 tag = *base, sum = SEED;
    expect_words(0, sh);
    if (CLUSTER > 1) cluster_arrive(), cluster_wait();
    if (WITHIN) publish(words, flags, 0, tag, SEED, sh);
    fetch(weights, bytes, 0, 0, sh);
    fetch(weights, bytes, 1, 1, sh);
    for (int r = 0; r < n; r++) {
        if (r + 1 < n) expect_words(r + 1, sh);
        uint32 part = take(words, flags, r, tag + r, sum, sh);
        if (OWN) arrival_wait(&sh->arrival[r % 2], r / 2);
        sum = block_sum(part, r, sh);
        if (sh->failed) break;
        if (r + 1 < n) publish(words, flags, r + 1, tag + r + 1, sum, sh);
        if (r + 2 < n) fetch(weights, bytes, r + 2, r % 2, sh);
    }
    if (CLUSTER > 1) cluster_arrive(), cluster_wait();
    if (threadIdx.x == 0) {
        sums[blockIdx.x] = sum;
        if (sh->failed) *failed = 1;
    }
}

// One round a kernel, in a chain of kernels that start before those ahead have ended.
extern "C" __global__ void CLUSTERED __launch_bounds__(512, 2)
link(uint32* words, uint32* flags, const uint32* base, const uint8* weights, int64 bytes, int r, int last,
     uint32* sums, int* failed) {
    DYNAMIC_SHARED(Shared, sh);
    prepare(sh);
    fetch(weights, bytes, r, 0, sh);
    uint32 tag = *base;
    let_next_start();
    if (METHOD == PLAIN || r == 0) wait_for_previous();
    uint32 part = take(words, flags, r, tag + r, SEED, sh);
    if (OWN) arrival_wait(&sh->arrival[0], 0);
    uint32 sum = block_sum(part, r, sh);
    if (!last) publish(words, flags, r + 1, tag + r + 1, sum, sh);
    if (threadIdx.x == 0) {
        if (last) sums[blockIdx.x] = sum;
        if (sh->failed) *failed = 1;
    }
}

// Weights that stream to every multiprocessor beside what is measured: a piece every `period` clocks,
// or as fast as they come, until told to stop or for `most` nanoseconds.
constexpr int PIECE = 8192, PIECES = 8;
struct TrafficShared {
    uint64 arrival[PIECES];
    volatile int stop;
    __align__(128) uint8 piece[PIECES][PIECE];
};
DEV uint64 nanoseconds() {
    uint64 now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now)::"memory");
    return now;
}
KERNEL(64) traffic(const uint8* weights, int64 bytes, int period, int most, const volatile int* stop,
                   uint64* moved, uint64* took) {
    DYNAMIC_SHARED(TrafficShared, sh);
    if (threadIdx.x < PIECES) arrival_init(&sh->arrival[threadIdx.x]);
    if (threadIdx.x == 0) sh->stop = 0;
    __syncthreads();
    uint64 start = nanoseconds();
    if (threadIdx.x == WARP) {
        while (!*stop && nanoseconds() - start < uint64(most)) __nanosleep(500);
        sh->stop = 1;
    } else if (threadIdx.x == 0) {
        int64 next = clock64(), n = 0, last = bytes / PIECE;
        for (; !sh->stop; n++) {
            if (n >= PIECES) arrival_wait(&sh->arrival[n % PIECES], int(n / PIECES) - 1);
            while (clock64() < next) {}
            next += period;
            arrival_expect(&sh->arrival[n % PIECES], PIECE);
            copy_bulk(sh->piece[n % PIECES], weights + (n * gridDim.x + blockIdx.x) % last * PIECE, PIECE,
                      &sh->arrival[n % PIECES]);
        }
        for (int64 i = n < PIECES ? 0 : n - PIECES; i < n; i++)
            arrival_wait(&sh->arrival[i % PIECES], int(i / PIECES));
        moved[blockIdx.x] = n * PIECE;
        took[blockIdx.x] = nanoseconds() - start;
    }
}
