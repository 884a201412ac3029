// The end of a step of several sequences: what each goes on with.
#include "likeliest.cuh"

// A sequence a block: its likeliest token, noted and then the next one's input; its position moves on.
// logits: rows of `vocabulary`, a multiple of 4. generated: rows of `most`, by position.
KERNEL(1024) next_token(const float* logits, int vocabulary, int most, int* tokens, int* positions,
                        int* generated, int* not_finite) {
    begin();
    __shared__ uint64 best[1024 / WARP];
    const float4* row = reinterpret_cast<const float4*>(logits + int64(blockIdx.x) * vocabulary);
    uint64 key = 0;
    bool finite = true;
#pragma unroll 8
    for (int i = threadIdx.x; i < vocabulary / 4; i += blockDim.x) {
        float4 four = row[i];
        const float z[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
        for (int j = 0; j < 4; j++) {
            key = max(key, rank_key(z[j], 4 * i + j));
            finite = finite && magnitude(z[j]) < 0x7f800000u;
        }
    }
    if (!finite) *not_finite = 1;
    key = block_best<1024 / WARP>(key, best);
    if (threadIdx.x == 0) {
        int position = positions[blockIdx.x];
        generated[int64(blockIdx.x) * most + position] = tokens[blockIdx.x] = index_of(key);
        positions[blockIdx.x] = position + 1;
    }
}
