// Runs CUDA kernels on the CPU: a thread is a fiber, blocks run one after another (all at once for a
// cooperative launch, those of a cluster together; they may then only use dynamic shared memory). For the logic of a kernel, not
// its speed: warps must be whole at every collective. Threads are resumed in a random order, so that a
// missing barrier shows.
#pragma once
#define EMULATED
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <algorithm>
#include <functional>
#include <tuple>
#include <utility>
#include <vector>

#define DEV inline __attribute__((unused))
#define KERNEL(threads) static void
#define __shared__ static
#define __align__(n) __attribute__((aligned(n)))
#define __device__
#define __restrict__
#define __grid_constant__
#define DYNAMIC_SHARED(type, name) type* name = reinterpret_cast<type*>(emu::block->shared)
using std::max;
using std::min;

struct uint3_ { unsigned x, y, z; };
struct alignas(8) int2 { int x, y; };
struct alignas(8) float2 { float x, y; };
static inline float2 make_float2(float x, float y) { return {x, y}; }
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) short4 { short x, y, z, w; };
static inline int2 make_int2(int x, int y) { return {x, y}; }
static inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static uint3_ threadIdx, blockIdx, blockDim, gridDim;

namespace emu {
struct Warp { int arrived = 0; long generation = 0; unsigned long long slot[2][32]; int registers[2][32][6]; };
struct Block {
    uint3_ index;
    int live = 0, arrived = 0;
    long generation = 0;
    std::vector<Warp> warps;
    char* shared = nullptr;
};
struct Fiber {
    void* sp = nullptr;
    Block* block = nullptr;
    uint3_ thread;
    int lane = 0, parity = 0;
    bool done = false;
};
static Block* block;
static Fiber* fiber;
static void* scheduler_sp;
static long progress;
static std::vector<Block>* together;  // those that run at once
static long clusters_synced;
static unsigned cluster_arrived;
static unsigned chance;
static std::function<void()>* body;

// Save the callee-saved registers, change stacks (System V x86-64).
extern "C" void emu_switch(void** from, void* to);
asm(R"(
.text
.globl emu_switch
emu_switch:
  push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp
  ret
)");
static void yield() { emu_switch(&fiber->sp, scheduler_sp); }
static void release(Block* b) {
    if (b->live && b->arrived == b->live) { b->arrived = 0; b->generation++; progress++; }
}
static void entry() {
    (*body)();
    fiber->done = true;
    fiber->block->live--;
    progress++;
    release(fiber->block);
    yield();
    abort();
}
static void sync_block() {
    Block* b = block;
    long g = b->generation;
    b->arrived++;
    release(b);
    while (b->generation == g) yield();
}
static Warp& warp() { return block->warps[threadIdx.x / 32]; }
static void sync_warp() {
    Warp& w = warp();
    long g = w.generation;
    if (++w.arrived == 32) { w.arrived = 0; w.generation++; progress++; }
    while (w.generation == g) yield();
}
template <class T, class Pick> T exchange(T v, Pick pick) {
    int parity = fiber->parity ^= 1;
    Warp& w = warp();
    memcpy(&w.slot[parity][threadIdx.x % 32], &v, sizeof v);
    sync_warp();
    T all[32];
    for (int i = 0; i < 32; i++) memcpy(&all[i], &w.slot[parity][i], sizeof v);
    return pick(all);
}
// What every lane has in some registers.
template <int N> auto& registers(const int (&mine)[N]) {
    static_assert(N <= 6);
    int parity = fiber->parity ^= 1;
    Warp& w = warp();
    memcpy(w.registers[parity][threadIdx.x % 32], mine, sizeof mine);
    sync_warp();
    return w.registers[parity];
}
constexpr size_t STACK = 64 << 10;
// Given back after each launch: every kernel is a library, and 1,024 stacks are 64 MB.
struct Stacks {
    char* at;
    size_t bytes;
    explicit Stacks(size_t n) : at((char*)mmap(nullptr, n, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)), bytes(n) {
        if (at == MAP_FAILED) { fprintf(stderr, "emulator: no memory for stacks\n"); abort(); }
    }
    ~Stacks() { munmap(at, bytes); }
};
static void reset_copies();
static void reset_bulks();
static void run(uint3_ grid, unsigned threads, size_t shared, unsigned at_once, unsigned seed, std::function<void()> f) {
    body = &f;
    chance = seed;
    gridDim = grid;
    blockDim = {threads, 1, 1};
    if (threads % 32) { fprintf(stderr, "emulator: %u threads are not whole warps\n", threads); abort(); }
    unsigned blocks = grid.x * grid.y * grid.z;
    size_t fibers = size_t(at_once) * threads;
    Stacks stacks(fibers * STACK);
    // A block's shared memory begins with whole kilobytes, as on a device; what is written behind it shows.
    size_t pitch = (shared + 1023) / 1024 * 1024 + 1024;
    std::vector<char> dynamic((at_once + 1) * pitch);
    char* begin = (char*)((size_t(dynamic.data()) + 1023) / 1024 * 1024);
    for (unsigned first = 0; first < blocks; first += at_once) {
        std::vector<Block> group(at_once);
        together = &group;
        cluster_arrived = 0;
        std::vector<Fiber> all(fibers);
        for (unsigned b = 0; b < at_once; b++) {
            unsigned i = first + b;
            group[b].index = {i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y};
            group[b].live = threads;
            group[b].warps.resize(threads / 32);
            group[b].shared = begin + b * pitch;
            memset(group[b].shared, 0xa5, pitch);
            reset_copies();
            for (unsigned t = 0; t < threads; t++) {
                Fiber& x = all[b * threads + t];
                x.block = &group[b];
                x.thread = {t, 0, 0};
                void** top = (void**)(size_t(stacks.at + (b * threads + t + 1) * STACK) / 16 * 16);
                *--top = nullptr;
                *--top = (void*)entry;
                for (int r = 0; r < 6; r++) *--top = nullptr;
                x.sp = top;
            }
        }
        // Warps in a random order, lanes of a warp in a random rotation.
        std::vector<int> order(fibers / 32);
        for (size_t i = 0; i < order.size(); i++) order[i] = i;
        size_t left = fibers;
        for (int idle = 0; left;) {
            for (size_t i = order.size(); i > 1; i--) std::swap(order[i - 1], order[(seed = seed * 1664525u + 1013904223u) % i]);
            long before = progress;
            for (int w : order) {
                int turn = (seed = seed * 1664525u + 1013904223u) >> 27;
                for (int l = 0; l < 32; l++) {
                    Fiber& x = all[w * 32 + (l + turn) % 32];
                    if (x.done) continue;
                    fiber = &x;
                    block = x.block;
                    threadIdx = x.thread;
                    blockIdx = block->index;
                    emu_switch(&scheduler_sp, x.sp);
                    if (x.done) left--;
                }
            }
            idle = progress == before ? idle + 1 : 0;
            if (idle > 10000) { fprintf(stderr, "emulator: no thread can go on (divergent barrier?)\n"); abort(); }
        }
        for (Block& b : group)
            if (std::any_of(b.shared + shared, b.shared + pitch, [](char c) { return c != char(0xa5); })) {
                fprintf(stderr, "emulator: a block of %zu bytes of shared memory wrote behind them\n", shared);
                abort();
            }
    }
}
template <class... A, size_t... I> void call(void (*k)(A...), void** args, std::index_sequence<I...>) { k(*static_cast<std::decay_t<A>*>(args[I])...); }
template <class... A> void start(void (*k)(A...), void** args, const unsigned* g, unsigned threads, size_t shared, int at_once, unsigned seed) {
    run({g[0], g[1], g[2]}, threads, shared, at_once, seed, [=] { call(k, args, std::index_sequence_for<A...>{}); });
}
}  // namespace emu

static inline void __syncthreads() { emu::sync_block(); }
static inline void __syncwarp() { emu::sync_warp(); }
template <class T> T __shfl_sync(unsigned, T v, int from) { return emu::exchange<T>(v, [=](const T* a) { return a[from & 31]; }); }
template <class T> T __shfl_xor_sync(unsigned, T v, int n) { int l = threadIdx.x % 32; return emu::exchange<T>(v, [=](const T* a) { return a[l ^ n]; }); }
static inline int warp_sum(int v) { return emu::exchange<int>(v, [](const int* a) { int s = 0; for (int i = 0; i < 32; i++) s += a[i]; return s; }); }
static inline unsigned warp_max(unsigned v) { return emu::exchange<unsigned>(v, [](const unsigned* a) { return *std::max_element(a, a + 32); }); }
static inline unsigned __ballot_sync(unsigned, int p) { return emu::exchange<int>(p != 0, [](const int* a) { int s = 0; for (int i = 0; i < 32; i++) s |= unsigned(a[i]) << i; return s; }); }
static inline unsigned __match_any_sync(unsigned, int v) { return emu::exchange<int>(v, [=](const int* a) { unsigned s = 0; for (int i = 0; i < 32; i++) s |= unsigned(a[i] == v) << i; return int(s); }); }
static inline int __popc(unsigned v) { return __builtin_popcount(v); }
static inline int bytes_dot(int a, int b, int c, int from_a, int width, int from_b, int n) {
    for (int i = 0; i < n; i++) {
        int x = width == 8 ? (signed char)(a >> 8 * (from_a + i)) : (short)(a >> 16 * (from_a + i));
        c += x * (signed char)(b >> 8 * (from_b + i));
    }
    return c;
}
static inline int dp4a(int a, int b, int c) { return bytes_dot(a, b, c, 0, 8, 0, 4); }
static inline int dp4a(unsigned a, int b, int c) {
    for (int i = 0; i < 4; i++) c += int(a >> 8 * i & 255) * (signed char)(b >> 8 * i);
    return c;
}
static inline int signed_byte_of(int word, int i) { return (signed char)(word >> 8 * i); }
static inline int dp2a_lo(int a, int b, int c) { return bytes_dot(a, b, c, 0, 16, 0, 2); }
static inline int dp2a_hi(int a, int b, int c) { return bytes_dot(a, b, c, 0, 16, 2, 2); }
static inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
static inline float square_root(float x) { return sqrtf(x); }
static inline float half_to_float(unsigned short h) { _Float16 f; memcpy(&f, &h, 2); return float(f); }
template <class T> T load_once(const T* p) { return *p; }
template <class T> T load_fresh(const T* p) { return *p; }
// A copy in the background happens at some time between its start and the wait for it: here, by chance, at
// the one or the other.
namespace emu { struct Copy { void* to; const void* from; }; static std::vector<Copy> copies[4096]; static std::vector<int> groups[4096]; }
void emu::reset_copies() { for (auto& c : copies) c.clear(); for (auto& g : groups) g.clear(); reset_bulks(); }
static inline int emu_thread() { return threadIdx.x; }
static inline void copy_async(void* to, const void* from) {
    if (size_t(to) % 16 || size_t(from) % 16) { fprintf(stderr, "emulator: copy_async to or from an odd address\n"); abort(); }
    if ((emu::chance = emu::chance * 1664525u + 1013904223u) >> 31) memcpy(to, from, 16);
    else emu::copies[emu_thread()].push_back({to, from});
}
static inline void commit_copies() { emu::groups[emu_thread()].push_back(emu::copies[emu_thread()].size()); }
template <int PENDING> void wait_copies() {
    auto& g = emu::groups[emu_thread()];
    auto& c = emu::copies[emu_thread()];
    int n = int(g.size()) - PENDING;
    if (n <= 0) return;
    int done = g[n - 1];
    for (int i = 0; i < done; i++) memcpy(c[i].to, c[i].from, 16);
    c.erase(c.begin(), c.begin() + done);
    g.erase(g.begin(), g.begin() + n);
    for (int& x : g) x -= done;
}
// Hopper's bulk copies (with BULK_COPIES defined): each lands whole, at its start or while somebody waits
// for its arrival.
static inline int __ffs(unsigned v) { return __builtin_ffs(v); }
typedef unsigned long long Arrival;
namespace emu {
struct State { int phase; short pending, count; };
struct Bulk { void* to; const void* from; int bytes; Arrival* a; };
static std::vector<Bulk> bulks;
static std::vector<std::pair<Arrival*, long>> expected;
static State& state(Arrival* a) { return *reinterpret_cast<State*>(a); }
static long& bytes_of(Arrival* a) {
    for (auto& t : expected) if (t.first == a) return t.second;
    expected.push_back({a, 0});
    return expected.back().second;
}
static void complete(Arrival* a) {
    if (state(a).pending == 0 && bytes_of(a) == 0) { state(a).phase++; state(a).pending = state(a).count; progress++; }
}
static void land(size_t i) {
    Bulk b = bulks[i];
    bulks.erase(bulks.begin() + i);
    memcpy(b.to, b.from, b.bytes);
    bytes_of(b.a) -= b.bytes;
    complete(b.a);
}
static bool by_chance() { return (chance = chance * 1664525u + 1013904223u) >> 31; }
static void reset_bulks() {
    if (bulks.size()) { fprintf(stderr, "emulator: copies that nobody waited for\n"); abort(); }
    expected.clear();
}
}
static inline void arrival_init(Arrival* a, int count = 1) { emu::state(a) = {0, short(count), short(count)}; emu::bytes_of(a) = 0; }
static inline void arrive(Arrival* a) {
    emu::state(a).pending--;
    emu::complete(a);
}
static inline void arrival_expect(Arrival* a, int bytes) {
    if (emu::state(a).pending != 1) { fprintf(stderr, "emulator: a phase expected twice\n"); abort(); }
    emu::bytes_of(a) += bytes;
    emu::state(a).pending = 0;
    emu::complete(a);
}
static inline void arrival_wait(Arrival* a, int phase) {
    while ((emu::state(a).phase & 1) == (phase & 1)) {
        for (size_t i = emu::bulks.size(); i-- > 0;)
            if (emu::bulks[i].a == a && emu::by_chance()) { emu::land(i); emu::progress++; }
        emu::yield();
    }
}
static inline void copy_bulk(void* to, const void* from, int bytes, Arrival* a) {
    if (size_t(to) % 16 || size_t(from) % 16 || bytes % 16 || bytes <= 0) { fprintf(stderr, "emulator: an odd copy_bulk\n"); abort(); }
    emu::bulks.push_back({to, from, bytes, a});
    if (emu::by_chance()) emu::land(emu::bulks.size() - 1);
}
// The blocks of a cluster run at once.
static inline void copy_bulk_to_all(void* to, const void* from, int bytes, Arrival* a, int blocks) {
    for (size_t b = 0; b < emu::together->size(); b++) {
        auto there = [&](void* p) { return (*emu::together)[b].shared + ((char*)p - emu::block->shared); };
        if (blocks >> b & 1) copy_bulk(there(to), from, bytes, (Arrival*)there(a));
    }
}
static inline void sync_cluster() {
    long g = emu::clusters_synced;
    if (++emu::cluster_arrived == emu::together->size() * blockDim.x) emu::cluster_arrived = 0, emu::clusters_synced++, emu::progress++;
    while (emu::clusters_synced == g) emu::yield();
}
static inline void copy_bulk_once(void* to, const void* from, int bytes, Arrival* a) { copy_bulk(to, from, bytes, a); }
#define COPY_WEIGHTS copy_bulk
// Every 256th byte is touched: outside the device's memory that ends the process.
static inline void prefetch_bulk(const unsigned char* from, int bytes) {
    if (size_t(from) % 16 || bytes % 16 || bytes <= 0) { fprintf(stderr, "emulator: an odd prefetch\n"); abort(); }
    for (int i = 0; i < bytes; i += 256) (void)*(const volatile unsigned char*)(from + i);
    (void)*(const volatile unsigned char*)(from + bytes - 1);
}
static inline unsigned long long load_relaxed(const unsigned long long* p) { return *p; }
static inline void store_relaxed(unsigned long long* p, unsigned long long v) { *p = v; }
static inline void wait_for_previous() {}
template <class T> T at_hand(T v) { return v; }
static inline void let_next_start() {}
static inline void __threadfence() {}
template <class T> T atomicAdd(T* p, T n) { T old = *p; *p += n; return old; }
static inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) { return (unsigned __int128)a * b >> 64; }
static inline unsigned atomicOr(unsigned* p, unsigned v) { unsigned old = *p; *p |= v; return old; }
// Tensor-core products and the loads that feed them: every lane gathers what the others hold.
typedef const char* SharedAddress;
static inline SharedAddress shared_address(const void* p) { return (const char*)p; }
static inline void load_matrices(int (&r)[4], SharedAddress address) {
    int l = threadIdx.x % 32;
    emu::exchange<SharedAddress>(address, [&](const SharedAddress* a) {
        for (int m = 0; m < 4; m++) memcpy(&r[m], a[8 * m + l / 4] + 4 * (l % 4), 4);
        return nullptr;
    });
    __syncwarp();
}
// a: registers of rows g and g+8 for each 16 values in turn; b: one for each 16 values.
template <int HALVES, class Byte = signed char> void product(int (&c)[4], const int (&a)[2 * HALVES], const int (&b)[HALVES]) {
    int mine[3 * HALVES], l = threadIdx.x % 32;
    memcpy(mine, a, sizeof a);
    memcpy(mine + 2 * HALVES, b, sizeof b);
    auto& all = emu::registers(mine);
    Byte rows[2][16 * HALVES];
    signed char columns[2][16 * HALVES];
    for (int i = 0; i < 2; i++)
        for (int k = 0; k < 4 * HALVES; k++) {
            memcpy(&rows[i][4 * k], &all[l / 4 * 4 + k % 4][k / 4 * 2 + i], 4);
            memcpy(&columns[i][4 * k], &all[(l % 4 * 2 + i) * 4 + k % 4][2 * HALVES + k / 4], 4);
        }
    for (int i = 0; i < 4; i++)
        for (int k = 0; k < 16 * HALVES; k++) c[i] += rows[i / 2][k] * columns[i % 2][k];
}
static inline void product32(int (&c)[4], const int (&a)[4], int b0, int b1) { int b[2] = {b0, b1}; product<2>(c, a, b); }
static inline void product32(int (&c)[4], const unsigned (&a)[4], int b0, int b1) {
    int b[2] = {b0, b1};
    product<2, unsigned char>(c, reinterpret_cast<const int (&)[4]>(a), b);
}
static inline void product16(int (&c)[4], int a0, int a1, int b0) { int a[2] = {a0, a1}, b[1] = {b0}; product<1>(c, a, b); }
// Products of warpgroups (wgmma.cuh): of a warp's own 16 rows, at once. Where a byte of a matrix lies: bits of the
// address itself choose the order of chunks.
typedef unsigned long long Matrix;
static inline Matrix matrix_at(const void* p) { return size_t(p) / 16; }
static inline int matrix_byte(Matrix m, int row, int k) {
    size_t at = m * 16 + 128 * row + k;
    return *(const signed char*)(at ^ (at >> 7 & 7) << 4);
}
static inline void products_begin() {}
// They are computed when they are waited for, not before.
namespace emu { static std::vector<std::function<void()>> products[4096]; static std::vector<size_t> product_groups[4096]; }
static inline void products_commit() { emu::product_groups[threadIdx.x].push_back(emu::products[threadIdx.x].size()); }
template <int PENDING> void products_wait() {
    auto &all = emu::products[threadIdx.x];
    auto &groups = emu::product_groups[threadIdx.x];
    if (groups.size() <= PENDING) return;
    size_t n = groups.size() - PENDING, done = groups[n - 1];
    for (size_t i = 0; i < done; i++) all[i]();
    all.erase(all.begin(), all.begin() + done);
    groups.erase(groups.begin(), groups.begin() + n);
    for (size_t& g : groups) g -= done;
}
template <int N> void computed(int (&)[N]) {}
static inline void written_for_products() {}
template <int N, class A> void product_of_rows(int (&c)[N], A a, Matrix b, bool more) {
    int* to = c;
    int lane = threadIdx.x % 32;
    emu::products[threadIdx.x].push_back([=] {
        for (int i = 0; i < N; i++) {
            int row = lane / 4 + i % 4 / 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2, sum = more ? to[i] : 0;
            for (int k = 0; k < 32; k++) sum += a(row, k) * matrix_byte(b, column, k);
            to[i] = sum;
        }
    });
}
template <class Byte, int N> void product_of_registers(int (&c)[N], const int (&a)[4], Matrix b, bool more) {
    struct Lanes { int of[32][6]; } as;
    memcpy(as.of, emu::registers(a), sizeof as.of);
    product_of_rows(c, [=](int row, int k) { return int(Byte(as.of[row % 8 * 4 + k % 16 / 4][k / 16 * 2 + row / 8] >> 8 * (k % 4))); }, b, more);
}
template <int N> void product_rows(int (&c)[N], const int (&a)[4], Matrix b, bool more) { product_of_registers<signed char>(c, a, b, more); }
template <int N> void product_rows(int (&c)[N], const unsigned (&a)[4], Matrix b, bool more) {
    product_of_registers<unsigned char>(c, reinterpret_cast<const int (&)[4]>(a), b, more);
}
template <int N> void product_rows(int (&c)[N], Matrix a, Matrix b, bool more) {
    int first = threadIdx.x / 32 % 4 * 16;
    product_of_rows(c, [=](int row, int k) { return matrix_byte(a, first + row, k); }, b, more);
}
static inline int __byte_perm(unsigned x, unsigned y, unsigned pick) {
    unsigned long long both = (unsigned long long)y << 32 | x;
    unsigned r = 0;
    for (int i = 0; i < 4; i++) r |= unsigned(both >> 8 * (pick >> 4 * i & 7) & 255) << 8 * i;
    return int(r);
}

// Memory whose end lies on a page that cannot be touched.
extern "C" void* emu_alloc(size_t n) {
    size_t pages = (n + 15) / 16 * 16 + 4095 >> 12;
    char* p = (char*)mmap(nullptr, (pages + 1) << 12, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    mprotect(p + (pages << 12), 4096, PROT_NONE);
    return p + (pages << 12) - (n + 15) / 16 * 16;
}
extern "C" void emu_free(char* p, size_t n) {
    size_t pages = (n + 15) / 16 * 16 + 4095 >> 12;
    munmap(p + (n + 15) / 16 * 16 - (pages << 12), (pages + 1) << 12);
}
