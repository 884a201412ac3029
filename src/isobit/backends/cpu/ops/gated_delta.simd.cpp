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
    static void run(float* state, int stride, int n, const float* q, const float* k, const float* v,
                    float beta, float g, bool corrects, float* out);
};

#ifdef ISOBIT_LEVEL

namespace ISOBIT_SIMD {

// tree of row(0) … row(n - 1), in section 2's order: eight rows a fourth, an eighth, … of n apart at once.
template <class Row>
FN F tree_of(int n, Row&& row) {
    F sums[MAX_HEAD_DIM / 8 + 4];
    const int e = n / 8;
    for (int i = 0; i < e; ++i) {
        const F a = row(i) + row(i + 4 * e), b = row(i + 2 * e) + row(i + 6 * e);
        const F c = row(i + e) + row(i + 5 * e), d = row(i + 3 * e) + row(i + 7 * e);
        sums[i] = (a + b) + (c + d);
    }
    for (int i = 0; !e && i < n; ++i) sums[i] = row(i);
    for (int rows = (e ? e : n) / 2; rows; rows /= 2)
        for (int i = 0; i < rows; ++i) sums[i] = sums[i] + sums[i + rows];
    return sums[0];
}

}  // namespace ISOBIT_SIMD

template <>
void DeltaStep<LEVEL>::run(float* state, int stride, int n, const float* q, const float* k,
                           const float* v, float beta, float g, bool corrects, float* out) {
    using namespace ISOBIT_SIMD;
    const float keep = exp(g);
    for (int j = 0; j < DELTA_COLUMNS; j += LANES, state += LANES) {
        auto decayed = [&](int i) __attribute__((always_inline)) {
            F s;
            memcpy(&s, state + (size_t)i * stride, sizeof s);
            return s * keep;
        };
        F d;
        memcpy(&d, v + j, sizeof d);
        if (corrects) d = d - tree_of(n, [&](int i) __attribute__((always_inline)) { return decayed(i) * k[i]; });
        d = d * beta;
        const F o = tree_of(n, [&](int i) __attribute__((always_inline)) {
            const F s = decayed(i) + k[i] * d;
            memcpy(state + (size_t)i * stride, &s, sizeof s);
            return s * q[i];
        });
        memcpy(out + j, &o, sizeof o);
    }
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
        const bool begins = !pass.batch.positions[first];
        // A lone token's step goes over the state itself; several, columns that are no whole block and a
        // sequence that begins, over a copy.
        const bool copies = begins || end - first > 1 || columns < DELTA_COLUMNS;
        float copy[MAX_HEAD_DIM * DELTA_COLUMNS];
        if (copies)
            for (int i = 0; i < n; ++i) {
                float* to = copy + i * DELTA_COLUMNS;
                if (columns < DELTA_COLUMNS || begins) memset(to, 0, DELTA_COLUMNS * sizeof(float));
                if (!begins) memcpy(to, state + (size_t)i * m, columns * sizeof(float));
            }
        for (int t = first; t < end; ++t) {
            float v[DELTA_COLUMNS] = {}, out[DELTA_COLUMNS];
            memcpy(v, pass.at(op.in[2], thread, t, h) + j, columns * sizeof(float));
            run_of<DeltaStep>(pass.kernels)(copies ? copy : state, copies ? DELTA_COLUMNS : m, n,
                               pass.at(op.in[0], thread, t, of), pass.at(op.in[1], thread, t, of), v,
                               pass.at(op.in[3], thread, t, 0)[h],
                               pass.at(op.in[4], thread, t, 0)[h], op.integers[6], out);
            memcpy(pass.at(op.out[0], thread, t, h) + j, out, columns * sizeof(float));
        }
        for (int i = 0; copies && i < n; ++i)
            memcpy(state + (size_t)i * m, copy + i * DELTA_COLUMNS, columns * sizeof(float));
    });
}

static const PhaseKind kind("gated_delta", gated_delta);

#endif

}  // namespace isobit
