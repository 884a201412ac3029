// The end of a step: what each sequence goes on with.
#include "argmax.cuh"

// A sequence a column of blocks: its most likely token, noted and then the next one's input; its position moves on.
// found: for each block the best that it has seen; arrived: of a sequence, how many have, 0 before and after.
// logits: rows of `vocabulary`. first: positions of the first of these steps; generated: a row of all
// sequences for each step since, -1 once a logit was not finite. number: of the step, counting up, or null.
KERNEL(1024) next_token(const float* logits, int vocabulary, const int* first, int* tokens,
                        int* positions, int* generated, int* not_finite, int* number, uint64* found,
                        int* arrived) {
    begin();
    __shared__ uint64 best[1024 / WARP];
    int each = (vocabulary / 4 + gridDim.y - 1) / gridDim.y, from = blockIdx.y * each, to = min(from + each, vocabulary / 4);
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
        for (int i = from + threadIdx.x; i < to; i += READ * blockDim.x) {
            float4 four[READ];
#pragma unroll
            for (int r = 0; r < READ; r++)
                four[r] = reinterpret_cast<const float4*>(row)[min(i + r * int(blockDim.x), to - 1)];
#pragma unroll
            for (int r = 0; r < READ; r++) {
                const float z[4] = {four[r].x, four[r].y, four[r].z, four[r].w};
                int first = min(i + r * int(blockDim.x), to - 1) * 4;
#pragma unroll
                for (int j = 0; j < 4; j++) see(z[j], first + j);
            }
        }
    } else {
        for (int i = threadIdx.x + blockIdx.y * blockDim.x; i < vocabulary; i += gridDim.y * blockDim.x) see(row[i], i);
    }
    if (largest >= 0x7f800000u) not_finite[blockIdx.x] = 1;
    uint64 key = block_best<1024 / WARP>(rank_key(most, at), best);
    if (threadIdx.x == 0) {
        if (gridDim.y > 1) {
            found += blockIdx.x * gridDim.y;
            store_relaxed(found + blockIdx.y, key);
            __threadfence();
            if (atomicAdd(arrived + blockIdx.x, 1) + 1 < int(gridDim.y)) return;
            __threadfence();
            arrived[blockIdx.x] = 0;
            for (int i = 0; i < int(gridDim.y); i++) key = max(key, load_relaxed(found + i));
        }
        int position = positions[blockIdx.x];
        generated[int64(position - first[blockIdx.x]) * gridDim.x + blockIdx.x] =
            load_fresh(not_finite + blockIdx.x) ? -1 : index_of(key);
        tokens[blockIdx.x] = index_of(key);
        positions[blockIdx.x] = position + 1;
        if (number && blockIdx.x == 0) ++*number;
    }
}
