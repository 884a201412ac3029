// Gates and norms of head vectors, docs/numerics.md sections 5 and 7, and the gated delta net, section
// 12.
#pragma once

namespace isobit::ISOBIT_SIMD {

FN float sigmoid_of(float x) { return 1.0f / (1.0f + isobit::exp(-x)); }

static void silu(const float* x, int n, float* y) {
    for (int i = 0; i < n; ++i) y[i] = x[i] / (1.0f + isobit::exp(-x[i]));
}

static void sigmoid(const float* x, int n, float* y) {
    for (int i = 0; i < n; ++i) y[i] = sigmoid_of(x[i]);
}

static void sigmoid_gate(const float* x, const float* gate, int n, float* y) {
    for (int i = 0; i < n; ++i) y[i] = x[i] * sigmoid_of(gate[i]);
}

static void gated_add(const float* x, const float* y, float gate, int n, float* out) {
    const float s = sigmoid_of(gate);
    for (int i = 0; i < n; ++i) out[i] = x[i] + s * y[i];
}

static void l2_norm(const float* x, int n, float eps, float scale, float* y) {
    Lanes256 lanes;
    for (int k = 0; k < n; k += 256)
        for (int i = 0; i < 256 && k + i < n; ++i) lanes.v[i] += x[k + i] * x[k + i];
    const float r = 1.0f / __builtin_sqrtf(lanes.sum() + eps);
    for (int i = 0; i < n; ++i) y[i] = (x[i] * r) * scale;
}

// softplus(a + dt) * rate
static void decay(const float* a, const float* dt, const float* rate, int n, float* g) {
    for (int i = 0; i < n; ++i) {
        const float x = a[i] + dt[i];
        const float u = isobit::exp(x < 0 ? x : -x);
        const float s = u / (2.0f + u), z = s * s;
        float p = 1.0f / 15;
        p = p * z + 1.0f / 13;
        p = p * z + 1.0f / 11;
        p = p * z + 1.0f / 9;
        p = p * z + 1.0f / 7;
        p = p * z + 1.0f / 5;
        p = p * z + 1.0f / 3;
        p = p * z + 1.0f;
        g[i] = ((x > 0 ? x : 0.0f) + (s + s) * p) * rate[i];
    }
}

// rows: of each tap, oldest first; taps: [taps][n].
static void causal_conv(const float* const* rows, const float* taps, int n_taps, int n, float* y) {
    for (int i = 0; i < n; ++i) y[i] = rows[0][i] * taps[i];
    for (int t = 1; t < n_taps; ++t) {
        const float *row = rows[t], *tap = taps + (size_t)t * n;
        for (int i = 0; i < n; ++i) y[i] = y[i] + row[i] * tap[i];
    }
}

// One token on DELTA_COLUMNS columns of one head's state [n][stride].
static void delta(float* state, int stride, int n, const float* q, const float* k, const float* v,
                  float beta, float keep, float* out) {
    constexpr int W = DELTA_COLUMNS;
    float sums[MAX_HEAD_DIM / 2][W], d[W];
    auto tree = [&] {
        for (int rows = n / 4; rows; rows /= 2)
            for (int i = 0; i < rows; ++i)
                for (int j = 0; j < W; ++j) sums[i][j] = sums[i][j] + sums[i + rows][j];
    };
    const int half = n / 2;
    for (int i = 0; i < half; ++i) {
        float *low = state + (size_t)i * stride, *high = state + (size_t)(i + half) * stride;
        for (int j = 0; j < W; ++j) {
            low[j] = low[j] * keep;
            high[j] = high[j] * keep;
            sums[i][j] = low[j] * k[i] + high[j] * k[i + half];
        }
    }
    tree();
    for (int j = 0; j < W; ++j) d[j] = (v[j] - sums[0][j]) * beta;
    for (int i = 0; i < half; ++i) {
        float *low = state + (size_t)i * stride, *high = state + (size_t)(i + half) * stride;
        for (int j = 0; j < W; ++j) {
            low[j] = low[j] + k[i] * d[j];
            high[j] = high[j] + k[i + half] * d[j];
            sums[i][j] = low[j] * q[i] + high[j] * q[i + half];
        }
    }
    tree();
    for (int j = 0; j < W; ++j) out[j] = sums[0][j];
}

}  // namespace isobit::ISOBIT_SIMD
