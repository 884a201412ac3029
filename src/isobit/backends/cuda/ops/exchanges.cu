// The begin of a pass of a part of a split model: its exchanges have numbers of their own (exchange.cuh), which
// are there before any other kernel of the pass starts.
#include "common.cuh"

KERNEL(32) exchanges(int* count, int sites) {
    wait_for_previous();
    if (threadIdx.x) return;
    *count = int(uint32(load_fresh(count)) + uint32(sites));
    __threadfence();
    let_next_start();
}
