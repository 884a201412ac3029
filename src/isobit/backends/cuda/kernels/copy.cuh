// Copies to shared memory, and to the device's shared cache, that go on in the background.
#pragma once
#include "common.cuh"

// Bulk copies to shared memory take longer where they do not begin with a line (docs/performance.md).
constexpr int LINE = 128;
DEV constexpr int whole_lines(int bytes) { return (bytes + LINE - 1) / LINE * LINE; }

#ifndef EMULATED
typedef uint32 SharedAddress;
DEV SharedAddress shared_address(const void* p) { return uint32(__cvta_generic_to_shared(p)); }

// 16 bytes; a thread waits for its own.
DEV void copy_async(void* to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from)
                 : "memory");
}
DEV void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// All committed groups but the last PENDING have arrived.
template <int PENDING>
DEV void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

#if __CUDA_ARCH__ >= 900
#define BULK_COPIES
// Hopper's copies of whole runs of bytes (a multiple of 16) are counted by an Arrival in shared memory:
// one thread says how many bytes to expect, then all who wait see each phase end when they are there.
typedef unsigned long long Arrival;
DEV void arrival_init(Arrival* a, int count = 1) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(a)), "r"(count) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
// One of those that were said at the beginning to come.
DEV void arrive(Arrival* a) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(a)) : "memory");
}
DEV void arrival_expect(Arrival* a, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
                 ::"r"(shared_address(a)), "r"(bytes) : "memory");
}
DEV void arrival_wait(Arrival* a, int phase) {
    asm volatile("{\n.reg .pred there;\nAGAIN:\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 there, [%0], %1;\n"
                 "@!there bra AGAIN;\n}"
                 ::"r"(shared_address(a)), "r"(phase & 1) : "memory");
}
DEV void copy_bulk(void* to, const void* from, int bytes, Arrival* a) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1], %2, [%3];"
                 ::"r"(shared_address(to)), "l"(from), "r"(bytes), "r"(shared_address(a)) : "memory");
}
// The same of bytes that are used once in a pass: the device's cache lets go of them first.
DEV void copy_bulk_once(void* to, const void* from, int bytes, Arrival* a) {
    uint64 policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
                 "[%0], [%1], %2, [%3], %4;"
                 ::"r"(shared_address(to)), "l"(from), "r"(bytes), "r"(shared_address(a)), "l"(policy)
                 : "memory");
}
#ifdef ONCE  // in a pass are weights read, by hardly more than one block
#define COPY_WEIGHTS copy_bulk_once
#else
#define COPY_WEIGHTS copy_bulk
#endif
// The same to all blocks of a cluster that `blocks` has a bit for, at the same place of each, and counted by
// the arrival there.
DEV void copy_bulk_to_all(void* to, const void* from, int bytes, Arrival* a, int blocks) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
                 "[%0], [%1], %2, [%3], %4;"
                 ::"r"(shared_address(to)), "l"(from), "r"(bytes), "r"(shared_address(a)), "h"(uint16(blocks))
                 : "memory");
}
DEV void sync_cluster() {
    asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}
#endif

// Bytes (a multiple of 16) into the device's shared cache.
DEV void prefetch_bulk(const uint8* from, int bytes) {
#ifdef BULK_COPIES
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
#else
    for (int i = 0; i < bytes; i += 128) asm volatile("prefetch.global.L2 [%0];" ::"l"(from + i));
#endif
}
#endif

// What tensor-core products read of an ActivationBlock. 560 bytes: eight lanes that read eight blocks at
// one offset meet no shared-memory bank twice.
struct __align__(16) ColumnActivations {
    int8 plane[2][SUPER];
    int8 digits[3][8];
    float d;
    int unused[5];
};
static_assert(sizeof(ColumnActivations) == 560, "ColumnActivations is also known to layout.py");

constexpr int COLUMN_BYTES = 2 * SUPER + 24 + sizeof(float) + sizeof(int);  // of them in an ActivationBlock
// By one warp: both planes, then digits and d in two pieces of 16 bytes.
DEV void copy_activations(ColumnActivations* to, const ActivationBlock* from) {
    static_assert(sizeof(ActivationBlock::plane) == WARP * sizeof(int4), "a lane copies one piece of both planes");
    static_assert(sizeof(ActivationBlock::digits) + sizeof(ActivationBlock::d) <= 2 * sizeof(int4), "digits and d are two pieces");
    auto copy = [](int8* to, const int8* from) {
        copy_async(reinterpret_cast<int4*>(to) + lane_id(), reinterpret_cast<const int4*>(from) + lane_id());
    };
    copy(to->plane[0], from->plane[0]);
    if (lane_id() < 2) copy(to->digits[0], from->digits[0]);
}
// The same, quantised from a lane's eight values of a superblock.
DEV void quantise_act(const float (&x)[8], ColumnActivations* to) {
    QuantisedLane of = quantise_planes(x, to->plane);
    of.sum += shuffle_xor(of.sum, 1);
    of.sum += shuffle_xor(of.sum, 2);
    store_digits(of.sum, to->digits);
    if (lane_id() == 0) to->d = of.d;
}
