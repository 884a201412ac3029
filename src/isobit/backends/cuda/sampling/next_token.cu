// The end of a step: what each sequence goes on with.
#include "argmax.cuh"

// A sequence a block: its likeliest token, noted and then the next one's input; its position moves on.
// logits: rows of `vocabulary`. first: positions of the first of these steps; generated: a row of all
// sequences for each step since, -1 once a logit was not finite. number: of the step, counting up, or null.
KERNEL(1024) next_token(const float* logits, int vocabulary, const int* first, int* tokens,
                        int* positions, int* generated, int* not_finite, int* number) {
    begin();
    __shared__ uint64 best[1024 / WARP];
    const float* row = logits + int64(blockIdx.x) * vocabulary;
    uint64 key = 0;
    bool finite = true;
    auto see = [&](float z, int i) {
        key = max(key, rank_key(z, i));
        finite = finite && magnitude(z) < 0x7f800000u;
    };
    if (vocabulary % 4 == 0) {
#pragma unroll 8
        for (int i = threadIdx.x; i < vocabulary / 4; i += blockDim.x) {
            float4 four = reinterpret_cast<const float4*>(row)[i];
            const float z[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
            for (int j = 0; j < 4; j++) see(z[j], 4 * i + j);
        }
    } else {
        for (int i = threadIdx.x; i < vocabulary; i += blockDim.x) see(row[i], i);
    }
    if (!finite) not_finite[blockIdx.x] = 1;
    key = block_best<1024 / WARP>(key, best);
    if (threadIdx.x == 0) {
        int position = positions[blockIdx.x];
        generated[int64(position - first[blockIdx.x]) * gridDim.x + blockIdx.x] =
            not_finite[blockIdx.x] ? -1 : index_of(key);
        tokens[blockIdx.x] = index_of(key);
        positions[blockIdx.x] = position + 1;
        if (number && blockIdx.x == 0) ++*number;
    }
}
