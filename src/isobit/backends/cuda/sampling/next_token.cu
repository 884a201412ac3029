// The end of a step: what each sequence goes on with.
#include "argmax.cuh"

// A sequence a block: its most likely token, noted and then the next one's input; its position moves on.
// logits: rows of `vocabulary`. first: positions of the first of these steps; generated: a row of all
// sequences for each step since, -1 once a logit was not finite. number: of the step, counting up, or null.
KERNEL(1024) next_token(const float* logits, int vocabulary, const int* first, int* tokens,
                        int* positions, int* generated, int* not_finite, int* number) {
    begin();
    __shared__ uint64 best[1024 / WARP];
    const float* row = logits + int64(blockIdx.x) * vocabulary;
    float most = isobit::from_bits(0xff800000u);
    int at = 0;
    uint32 largest = 0;
    auto see = [&](float z, int i) {  // i goes up
        at = z > most ? i : at;
        most = z > most ? z : most;
        largest = max(largest, magnitude(z));
    };
    if (vocabulary % 4 == 0) {
        constexpr int READ = 4;  // at once
        for (int i = threadIdx.x; i < vocabulary / 4; i += READ * blockDim.x) {
            float4 four[READ];
#pragma unroll
            for (int r = 0; r < READ; r++)
                four[r] = reinterpret_cast<const float4*>(row)[min(i + r * int(blockDim.x), vocabulary / 4 - 1)];
#pragma unroll
            for (int r = 0; r < READ; r++) {
                const float z[4] = {four[r].x, four[r].y, four[r].z, four[r].w};
                int first = min(i + r * int(blockDim.x), vocabulary / 4 - 1) * 4;
#pragma unroll
                for (int j = 0; j < 4; j++) see(z[j], first + j);
            }
        }
    } else {
        for (int i = threadIdx.x; i < vocabulary; i += blockDim.x) see(row[i], i);
    }
    if (largest >= 0x7f800000u) not_finite[blockIdx.x] = 1;
    uint64 key = block_best<1024 / WARP>(rank_key(most, at), best);
    if (threadIdx.x == 0) {
        int position = positions[blockIdx.x];
        generated[int64(position - first[blockIdx.x]) * gridDim.x + blockIdx.x] =
            not_finite[blockIdx.x] ? -1 : index_of(key);
        tokens[blockIdx.x] = index_of(key);
        positions[blockIdx.x] = position + 1;
        if (number && blockIdx.x == 0) ++*number;
    }
}
