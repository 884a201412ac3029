// Copies to shared memory, and to the device's shared cache, that go on in the background.
#pragma once
#include "common.cuh"

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
// Ask for the 128 bytes at p to be brought into the device's shared cache.
DEV void prefetch_line(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }
#endif
