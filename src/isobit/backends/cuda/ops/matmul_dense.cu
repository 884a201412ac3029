// y = W x for F32, F16 and BF16, the same W for all tokens: see dense.cuh.
#include "dense.cuh"

// Tokens of a block: `each`.
KERNEL(512) matmul_dense(const uint8* weights, const float* x, int columns, int tokens, int each, float* y,
                         int rows, int stride) {
    DYNAMIC_SHARED(DenseShared, sh);
    int begin = blockIdx.y * each;
    auto wait = [] {
        let_next_start();
        wait_for_previous();
    };
    multiply(sh, weights, x, columns, begin, min(begin + each, tokens), rows, wait,
             [&](int token, int row, float z) { y[int64(token) * stride + row] = z; });
}
