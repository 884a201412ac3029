// The tokens of a pass that follows another one, from what that has found.
#include "common.cuh"

// places: of each of n tokens its place in `found`, or below 0 if it is there already. One that was not chosen, as
// its logits were not finite, is any: nobody asks for what comes of it.
KERNEL(256) take_tokens(const int* found, const int* places, int n, int* tokens) {
    begin();
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n && places[i] >= 0) tokens[i] = max(found[places[i]], 0);
}
