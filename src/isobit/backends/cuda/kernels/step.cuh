// What the kernels of a captured step share, whatever its shapes: the step's state, time marks.
//
// Each kernel of a step starts while the one before it still runs, fetches weights that do not
// depend on it, and then waits for it (programmatic dependent launch). Nothing is written, and nothing
// that a kernel of the same step writes is read, before wait_for_previous(), except words that carry
// the step's number (`packed`), and by the prediction of the experts, which may be wrong (expert_prefetch.cuh).
#pragma once
#ifndef AT_ONCE
#define AT_ONCE 2  // common.cuh asks for it, so this file comes first
#endif
#ifndef SHARED_ALIGNMENT
#define SHARED_ALIGNMENT 128  // a LINE of copy.cuh
#endif
#include "common.cuh"

// Where the time of a step goes: with TIMELINE defined as the address of a buffer, every block notes
// there when it passed a point of a kernel (nanoseconds, of the last layer).
#ifdef TIMELINE
DEV void mark(int kernel, int point) {
    if (threadIdx.x) return;
    uint64 now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now)::"memory");
    int block = blockIdx.y * gridDim.x + blockIdx.x;
    reinterpret_cast<uint64*>(TIMELINE)[(kernel * 10 + point) * 256 + block % 256] = now;
}
#else
DEV void mark(int, int) {}
#endif

// What the step works on; it stays put in memory, so that one graph serves every step.
struct Step {
    int token, position;
    int not_finite;  // 1 when a logit was NaN or infinite
    int done;        // blocks of the head kernel that have ended
    int number;      // of the step, counting up
};

// An expert and its weight in one word, with the number of the step: whoever finds the number has all.
DEV uint64 packed(int number, int id, float weight) {
    return uint64(bits(weight)) << 32 | uint32(id & 0xffff) << 16 | uint32(number & 0xffff);
}
DEV bool is_of(uint64 one, int number) { return (uint32(one) & 0xffff) == (uint32(number) & 0xffff); }
DEV int chosen_id(uint64 one) { return uint32(one) >> 16; }
DEV float chosen_weight(uint64 one) { return isobit::from_bits(uint32(one >> 32)); }

// A superblock of x (global or shared) in a warp: eight values a lane.
DEV void load_super(const float* x, float (&v)[8]) {
    load8(x + 8 * lane_id(), v);
}
