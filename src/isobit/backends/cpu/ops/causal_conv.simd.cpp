// causal_conv: the taps vectors[0], [taps][channels], times the last rows of in[0] of the sequence, to
// out[0]; integers: state, taps, channels. keep_rows, after its phase: the rows that the sequence's next
// tokens need.

#include "../engine/simd_op.h"

#include <string.h>

namespace isobit {

// rows: of each tap, oldest first; taps: [taps][n].
template <Level>
struct CausalConv {
    static void run(const float* const* rows, const float* taps, int n_taps, int n, float* y);
};

#ifdef ISOBIT_LEVEL

template <>
void CausalConv<LEVEL>::run(const float* const* rows, const float* taps, int n_taps, int n, float* y) {
    for (int i = 0; i < n; ++i) y[i] = rows[0][i] * taps[i];
    for (int t = 1; t < n_taps; ++t) {
        const float *row = rows[t], *tap = taps + (size_t)t * n;
        for (int i = 0; i < n; ++i) y[i] = y[i] + row[i] * tap[i];
    }
}

#else

// Row t + back of the sequence of token t, back <= 0: of this batch, kept before, or null: before its
// start.
static const float* row(const Op& op, Pass& p, int thread, int t, int back) {
    const int first = p.first(t), at = t + back, taps = op.integers[1];
    if (at >= first) return p.at(op.in[0], thread, at, 0);
    if (p.batch.positions[first] + (at - first) < 0) return nullptr;
    return p.state(op.integers[0], t) + (size_t)(at - first + taps - 1) * op.integers[2];
}

static void causal_conv(const Op& op, Pass& p, int thread, int t, int) {
    const int taps = op.integers[1], n = op.integers[2];
    const float* rows[16];
    for (int i = 0; i < taps; ++i) {
        const float* r = row(op, p, thread, t, i - taps + 1);
        rows[i] = r ? r : p.zeros();
    }
    run_of<CausalConv>(p.kernels)(rows, op.vectors[0], taps, n, p.at(op.out[0], thread, t, 0));
}

static void keep_rows(const Op& op, Pass& p, int thread, int, int) {
    const int taps = op.integers[1], n = op.integers[2];
    for (int t = 0; t < p.batch.n_tokens; ++t) {
        if (t + 1 < p.batch.n_tokens && p.first(t + 1) == p.first(t)) continue;
        float* kept = p.state(op.integers[0], t);
        for (int i = 0; i < taps - 1; ++i) {  // oldest first, so that none is overwritten unread
            const float* r = row(op, p, thread, t, i - taps + 2);
            memmove(kept + (size_t)i * n, r ? r : p.zeros(), n * sizeof(float));
        }
    }
}

static const OpKind kind("causal_conv", causal_conv);
static const OpKind after("keep_rows", keep_rows);

#endif

}  // namespace isobit
