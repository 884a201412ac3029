// y = W x for F32, F16 and BF16 (docs/numerics.md, section 4), the same W for all tokens.
// Thread j of a half of the block is lane j of sum256 for ROWS rows. It holds their weights, of SUPERS
// times 256 columns (WEIGHT: a FloatKind), and tokens come by one after another.
#include "formats.cuh"

constexpr int HALVES = 2, TOGETHER = 2;  // tokens whose lanes are added up at once
constexpr int SUMS = TOGETHER * ROWS;    // of a half

// Whether column `lane` of superblock s is there; those behind the last count as 0.
DEV bool there(int s, int lane, int columns) {
    return s + 1 < SUPERS || s * SUPER + lane < columns;
}
DEV void load_token(const float* x, int lane, int columns, float (&v)[SUPERS]) {
    x += lane;
#pragma unroll
    for (int s = 0; s < SUPERS; s++) v[s] = there(s, lane, columns) ? x[s * SUPER] : 0.0f;
}

// A block takes HALVES * ROWS rows and `each` tokens. lanes: shared, [2][HALVES][SUMS][SUPER].
KERNEL(512) matmul_dense(const uint8* weights, const float* x, int columns, int tokens, int each, float* y,
                         int rows, int stride) {
    DYNAMIC_SHARED(float, lanes);
    int half = threadIdx.x / SUPER, lane = threadIdx.x % SUPER;
    int first_row = (blockIdx.x * HALVES + half) * ROWS;
    float w[ROWS][SUPERS], next[SUPERS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        // Missing rows are computed as the last is, and not stored.
        int64 at = int64(min(first_row + r, rows - 1)) * columns + lane;
#pragma unroll
        for (int s = 0; s < SUPERS; s++)
            w[r][s] = there(s, lane, columns) ? load_float(weights, at + s * SUPER, WEIGHT) : 0.0f;
    }
    let_next_start();
    wait_for_previous();
    int begin = blockIdx.y * each, end = min(begin + each, tokens);
    load_token(x + int64(begin) * columns, lane, columns, next);
    float* here = lanes + half * SUMS * SUPER;
    int other = HALVES * SUMS * SUPER;  // where the next tokens' lanes go
    for (int token = begin; token < end; token += TOGETHER) {
#pragma unroll
        for (int i = 0; i < TOGETHER; i++) {
            float v[SUPERS];
#pragma unroll
            for (int s = 0; s < SUPERS; s++) v[s] = next[s];
            load_token(x + int64(min(token + i + 1, end - 1)) * columns, lane, columns, next);
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                float sum = mul(w[r][0], v[0]);
#pragma unroll
                for (int s = 1; s < SUPERS; s++) sum = add(sum, mul(w[r][s], v[s]));
                here[(i * ROWS + r) * SUPER + lane] = sum;
            }
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < (SUMS + 7) / 8; i++) {  // a warp a sum
            int at = i * (SUPER / WARP) + lane / WARP;
            if (at >= SUMS) break;
            // A lane that began with its first product, not with 0, may be -0 where it should be +0:
            // the sum is then 0, and its sign is made good.
            float total = add(buffer_tree(here + at * SUPER), 0.0f);
            int of = token + at / ROWS, row = first_row + at % ROWS;
            if (lane_id() == 0 && of < end && row < rows) y[int64(of) * stride + row] = total;
        }
        here += other;
        other = -other;
    }
}
