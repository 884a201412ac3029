// RMS norm (docs/numerics.md, section 5), also of a sum, with the quantisation of what it gives.
#include "views.cuh"

// A vector of n values a block.
KERNEL(THREADS) rms_norm(const float* x, int64 stride, int step, int per_row, const float* weight,
                         float eps, int n, float* y) {
    begin();
    __shared__ float buffer[SUPER];
    x = View{x, stride, step, per_row}.vector(blockIdx.x);
    y += int64(blockIdx.x) * n;
    float sum = 0.0f;
    for (int i = threadIdx.x; i < n; i += THREADS) sum = add(sum, mul(x[i], x[i]));
    float mean = div(block_tree(sum, buffer), float(n));
    float r = div(1.0f, square_root(add(mean, eps)));
    for (int i = threadIdx.x; i < n; i += THREADS) y[i] = mul(mul(x[i], r), weight[i]);
}

// ((0 + w_1 * y_1) + w_2 * y_2) + … in columns i and i + step; rows of y are n apart.
DEV void weighted(const float* w, const float* y, int k, int n, int i, int step, float (&sum)[2]) {
    constexpr int RANKS = 8;
    for (int first = 0; first < k; first += RANKS) {
        float part[RANKS][2];
#pragma unroll
        for (int r = 0; r < RANKS; r++)
#pragma unroll
            for (int c = 0; c < 2; c++)
                if (first + r < k && i + c * step < n)
                    part[r][c] = y[int64(first + r) * n + i + c * step];
#pragma unroll
        for (int r = 0; r < RANKS; r++)
#pragma unroll
            for (int c = 0; c < 2; c++)
                if (first + r < k) sum[c] = add(sum[c], mul(w[first + r], part[r][c]));
    }
}

// A row a block: x += residual, or the weighted sum of k rows of residual if there are weights, or
// nothing where it is null; y = norm of x, out = y quantised. row: shared, n floats. Four threads for
// each lane of sum256, so that a row is read at once.
KERNEL(1024) norm_quantise(float* x, const float* residual, const float* weights, int k,
                           const float* norm, float eps, int n, float* y, Act* out) {
    begin();
    DYNAMIC_SHARED(float, row);
    __shared__ float buffer[SUPER];
    int64 start = int64(blockIdx.x) * n;
    int supers = (n + SUPER - 1) / SUPER, step = blockDim.x;
    if (weights) weights += blockIdx.x * k;
    for (int i = threadIdx.x; i < n; i += 2 * step) {
        float more[2] = {};
        if (weights) weighted(weights, residual + start * k, k, n, i, step, more);
#pragma unroll
        for (int c = 0; c < 2; c++) {
            int at = i + c * step;
            if (at >= n) break;
            float v = x[start + at];
            if (residual) x[start + at] = v = add(v, weights ? more[c] : residual[start + at]);
            row[at] = v;
        }
    }
    __syncthreads();
    if (threadIdx.x < SUPER) {
        float sum = 0.0f;
        for (int i = threadIdx.x; i < n; i += SUPER) sum = add(sum, mul(row[i], row[i]));
        buffer[threadIdx.x] = sum;
    }
    __syncthreads();
    float mean = div(buffer_tree(buffer), float(n));
    float r = div(1.0f, square_root(add(mean, eps)));
    for (int i = threadIdx.x; i < n; i += step)
        y[start + i] = row[i] = mul(mul(row[i], r), norm[i]);
    __syncthreads();
    for (int s = warp_id(); s < supers; s += step / WARP) {
        int column = s * SUPER + 8 * lane_id();
        float v[8];
        for (int i = 0; i < 8; i++) v[i] = column + i < n ? row[column + i] : 0.0f;
        quantise_superblock(v, out + int64(blockIdx.x) * supers + s);
    }
}
