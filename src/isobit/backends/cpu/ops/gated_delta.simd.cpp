// gated_delta: in: q, k, v, beta, g; out: [tokens, heads * size of v]; integers: state, key heads, heads,
// size, size of v, how many value heads, one behind the other, read the same key head, whether what the state
// has of a key is taken off its value. A work item is some columns of one head's state of one sequence, over all
// its tokens.

#include "../engine/simd_op.h"

#ifndef ISOBIT_LEVEL
#include <string.h>
#include <algorithm>
#endif

namespace isobit {

// One token on DELTA_COLUMNS columns of one head's state [n][stride].
template <Level>
struct DeltaStep {
    static void run(float* state, int stride, int n, const float* q, const float* k, const float* v, float beta, float g, bool corrects, float* out);
};

#ifdef ISOBIT_LEVEL

template <>
void DeltaStep<LEVEL>::run(float* state, int stride, int n, const float* q, const float* k, const float* v, float beta, float g, bool corrects, float* out) {
    constexpr int W = DELTA_COLUMNS;
    const float keep = exp(g);
    float sums[MAX_HEAD_DIM / 2][W], d[W];
    auto tree = [&] {
        for (int rows = n / 4; rows; rows /= 2)
            for (int i = 0; i < rows; ++i)
                for (int j = 0; j < W; ++j) sums[i][j] = sums[i][j] + sums[i + rows][j];
    };
    const int half = n / 2;
    for (int i = 0; corrects && i < half; ++i) {
        float *low = state + (size_t)i * stride, *high = state + (size_t)(i + half) * stride;
        for (int j = 0; j < W; ++j) {
            low[j] = low[j] * keep;
            high[j] = high[j] * keep;
            sums[i][j] = low[j] * k[i] + high[j] * k[i + half];
        }
    }
    if (corrects) tree();
    for (int j = 0; j < W; ++j) d[j] = (corrects ? v[j] - sums[0][j] : v[j]) * beta;
    auto add = [&](bool decays) __attribute__((always_inline)) {
        for (int i = 0; i < half; ++i) {
            float *low = state + (size_t)i * stride, *high = state + (size_t)(i + half) * stride;
            for (int j = 0; j < W; ++j) {
                low[j] = (decays ? low[j] * keep : low[j]) + k[i] * d[j];
                high[j] = (decays ? high[j] * keep : high[j]) + k[i + half] * d[j];
                sums[i][j] = low[j] * q[i] + high[j] * q[i + half];
            }
        }
    };
    corrects ? add(false) : add(true);
    tree();
    for (int j = 0; j < W; ++j) out[j] = sums[0][j];
}

#else

static void gated_delta(const Phase& phase, Pass& pass, int thread) {
    const Op& op = phase.op;
    const int K = op.integers[1], H = op.integers[2], n = op.integers[3], m = op.integers[4];
    const int blocks = (m + DELTA_COLUMNS - 1) / DELTA_COLUMNS;
    const std::vector<int>& starts = pass.starts();  // of each sequence, then the end
    const int sequences = (int)starts.size() - 1;
    pass.team.parallel_for(sequences * H * blocks, [&](int item) {
        const int j = item % blocks * DELTA_COLUMNS, h = item / blocks % H;
        const int of = h / op.integers[5] % K;  // the key head
        const int first = starts[item / blocks / H], end = starts[item / blocks / H + 1];
        const int columns = std::min(DELTA_COLUMNS, m - j);
        float* state = pass.state(op.integers[0], first) + (size_t)h * n * m + j;
        // Columns that are not whole blocks, and the state of a sequence that begins, elsewhere.
        float block[MAX_HEAD_DIM * DELTA_COLUMNS];
        for (int i = 0; i < n; ++i)
            for (int c = 0; c < DELTA_COLUMNS; ++c)
                block[i * DELTA_COLUMNS + c] =
                    c < columns && pass.batch.positions[first] ? state[(size_t)i * m + c] : 0;
        for (int t = first; t < end; ++t) {
            float v[DELTA_COLUMNS] = {}, out[DELTA_COLUMNS];
            memcpy(v, pass.at(op.in[2], thread, t, h) + j, columns * sizeof(float));
            run_of<DeltaStep>(pass.kernels)(block, DELTA_COLUMNS, n, pass.at(op.in[0], thread, t, of),
                               pass.at(op.in[1], thread, t, of), v,
                               pass.at(op.in[3], thread, t, 0)[h],
                               pass.at(op.in[4], thread, t, 0)[h], op.integers[6], out);
            memcpy(pass.at(op.out[0], thread, t, h) + j, out, columns * sizeof(float));
        }
        for (int i = 0; i < n; ++i)
            memcpy(state + (size_t)i * m, block + i * DELTA_COLUMNS, columns * sizeof(float));
    });
}

static const PhaseKind kind("gated_delta", gated_delta);

#endif

}  // namespace isobit
