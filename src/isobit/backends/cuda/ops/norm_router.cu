// The RMS norm of a sum (docs/numerics.md, section 5), quantised, and its product with a small float32
// matrix: what chooses experts. A block has some tokens, one after the other, and 2 * ROWS rows of the
// matrix, which its threads hold: thread j of a half is lane j of sum256. Blocks of the same tokens make
// their norm each for itself, and quantise its superblocks in turns.
// WIDTH: values of a row, a multiple of 256.
#include "common.cuh"

constexpr int SUPERS = WIDTH / SUPER, ROWS = 8, HALVES = 2;

struct NormShared {
    float squares[HALVES][SUPER];
    float y[WIDTH];
    float lanes[HALVES * ROWS][SUPER];
};

// sum = x + added; out = its norm quantised; y = weights times it, `rows` values a token.
KERNEL(512) norm_router(const float* x, const float* added, const float* norm, float eps, float* sum,
                        Act* out, const float* weights, int rows, float* y, int tokens, int each) {
    DYNAMIC_SHARED(NormShared, sh);
    int half = threadIdx.x / SUPER, lane = threadIdx.x % SUPER, first = (blockIdx.x * HALVES + half) * ROWS;
    float w[ROWS][SUPERS], scale[SUPERS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        const float* row = weights + int64(min(first + r, rows - 1)) * WIDTH + lane;
#pragma unroll
        for (int s = 0; s < SUPERS; s++) w[r][s] = row[SUPER * s];
    }
#pragma unroll
    for (int s = 0; s < SUPERS; s++) scale[s] = norm[SUPER * s + lane];
    let_next_start();
    wait_for_previous();
    int end = min((int(blockIdx.y) + 1) * each, tokens);
#pragma unroll 1
    for (int token = blockIdx.y * each; token < end; token++) {
        int64 at = int64(token) * WIDTH + lane;
        float v[SUPERS], square = 0.0f;
#pragma unroll
        for (int s = 0; s < SUPERS; s++) v[s] = add(x[at + SUPER * s], added[at + SUPER * s]);
#pragma unroll
        for (int s = 0; s < SUPERS; s++) square = add(square, mul(v[s], v[s]));
        sh->squares[half][lane] = square;
        __syncthreads();
        float mean = div(buffer_tree(sh->squares[half]), float(WIDTH));
        float r = div(1.0f, square_root(add(mean, eps)));
#pragma unroll
        for (int s = 0; s < SUPERS; s++) {
            if (half == 0 && blockIdx.x == 0) sum[at + SUPER * s] = v[s];
            v[s] = mul(mul(v[s], r), scale[s]);
            if (half == 0) sh->y[SUPER * s + lane] = v[s];
        }
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            float dot = mul(w[i][0], v[0]);
#pragma unroll
            for (int s = 1; s < SUPERS; s++) dot = add(dot, mul(w[i][s], v[s]));
            sh->lanes[half * ROWS + i][lane] = dot;
        }
        __syncthreads();
        // A lane that began with its first product may be -0 where it should be +0: see matmul_dense.cu.
        float logit = add(buffer_tree(sh->lanes[warp_id()]), 0.0f);
        int row = blockIdx.x * HALVES * ROWS + warp_id();
        if (lane_id() == 0 && row < rows) y[int64(token) * rows + row] = logit;
        for (int s = blockIdx.x + gridDim.x * warp_id(); s < SUPERS; s += gridDim.x * (2 * ROWS)) {
            float value[8];
            load8(sh->y + SUPER * s + 8 * lane_id(), value);
            quantise_superblock(value, out + int64(token) * SUPERS + s);
        }
    }
}
