// y = W x for F32, F16 and BF16 (docs/numerics.md, section 4), the same W for all tokens.
// Thread j of a half of the block is lane j of sum256 for ROWS rows. It holds their weights, of SUPERS
// times 256 columns (WEIGHT: a FloatKind), and tokens come by, TOGETHER at a time: while their lanes
// are summed, those of the tokens before are added up and the tokens behind are on their way.
#include "formats.cuh"
#include "copy.cuh"
#include "mirrors.cuh"

constexpr int HALVES = 2, HALF_WARPS = SUPER / WARP;
constexpr int SUMS = TOGETHER * ROWS;  // of a half

struct DenseShared {  // twice: for these tokens, and for those before or behind
    __align__(16) float x[2][TOGETHER][SUPERS * SUPER];  // 0 behind the last column
    float lanes[2][HALVES][SUMS][SUPER];
};

// A block takes HALVES * ROWS rows and `each` tokens. columns: a multiple of 4.
KERNEL(512) matmul_dense(const uint8* weights, const float* x, int columns, int tokens, int each, float* y,
                         int rows, int stride, const uint64* exchanges) {
    Mirrors mirrors(exchanges);
    DYNAMIC_SHARED(DenseShared, sh);
    int half = threadIdx.x / SUPER, lane = threadIdx.x % SUPER;
    int first_row = (blockIdx.x * HALVES + half) * ROWS;
    float w[ROWS][SUPERS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        // Missing rows are computed as the last is, and not stored.
        int64 at = int64(min(first_row + r, rows - 1)) * columns + lane;
#pragma unroll
        for (int s = 0; s < SUPERS; s++) {
            bool there = s + 1 < SUPERS || s * SUPER + lane < columns;
            w[r][s] = there ? load_float(weights, at + s * SUPER, WEIGHT) : 0.0f;
        }
    }
#pragma unroll 1
    for (int i = 0; i < 2 * TOGETHER; i++)
#pragma unroll 1
        for (int k = columns + threadIdx.x; k < SUPERS * SUPER; k += 512)
            sh->x[i / TOGETHER][i % TOGETHER][k] = 0.0f;
    let_next_start();
    wait_for_previous();
    int begin = blockIdx.y * each, end = min(begin + each, tokens);
    auto fetch = [&](int token, int to) {
#pragma unroll
        for (int i = 0; i < TOGETHER; i++)
#pragma unroll 1
            for (int k = 4 * threadIdx.x; k < columns; k += 4 * 512)
                copy_async(sh->x[to][i] + k, x + int64(min(token + i, end - 1)) * columns + k);
    };
    fetch(begin, 0);
    int here = 0;
    for (int token = begin; token < end + TOGETHER; token += TOGETHER, here ^= 1) {
        commit_copies();
        wait_copies<0>();
        __syncthreads();
        if (token + TOGETHER < end) fetch(token + TOGETHER, here ^ 1);
#pragma unroll
        for (int i = 0; i < (SUMS + HALF_WARPS - 1) / HALF_WARPS; i++) {  // a warp a sum
            int at = i * HALF_WARPS + lane / WARP;
            if (token == begin || at >= SUMS) break;
            // A lane that began with its first product, not with 0, may be -0 where it should be +0:
            // the sum is then 0, and its sign is made good.
            float total = add(buffer_tree(sh->lanes[here ^ 1][half][at]), 0.0f);
            int of = token - TOGETHER + at / ROWS, row = first_row + at % ROWS;
            if (lane_id() == 0 && of < end && row < rows) mirrors.store(y + int64(of) * stride + row, total);
        }
        if (token >= end) break;
#pragma unroll
        for (int i = 0; i < TOGETHER; i++) {
            float v[SUPERS];
#pragma unroll
            for (int s = 0; s < SUPERS; s++) v[s] = sh->x[here][i][s * SUPER + lane];
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                float sum = mul(w[r][0], v[0]);
#pragma unroll
                for (int s = 1; s < SUPERS; s++) sum = add(sum, mul(w[r][s], v[s]));
                sh->lanes[here][half][i * ROWS + r][lane] = sum;
            }
        }
    }
}
