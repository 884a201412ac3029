// The begin of a pass of a part of a split model: its exchanges have numbers of their own (exchange.cuh).
#include "common.cuh"

KERNEL(32) exchanges(int* count, int sites) {
    begin();
    if (threadIdx.x == 0) *count = int(uint32(load_fresh(count)) + uint32(sites));
}
