// combine: the sum of in[1], a vector for each expert, by the weights in[0] to out[0]; integers: k,
// length.

#include "../engine/simd_op.h"

namespace isobit {

// y: k rows of n.
template <Level>
struct Combine {
    static void run(const float* weights, const float* y, int k, int n, float* out);
};

#ifdef ISOBIT_LEVEL

template <>
void Combine<LEVEL>::run(const float* weights, const float* y, int k, int n, float* out) {
    for (int i = 0; i < n; ++i) out[i] = 0;
    for (int rank = 0; rank < k; ++rank) {
        const float w = weights[rank];
        const float* row = y + (size_t)rank * n;
        for (int i = 0; i < n; ++i) out[i] = out[i] + w * row[i];
    }
}

#else

static void combine(const Op& op, Pass& p, int thread, int t, int) {
    run_of<Combine>(p.kernels)(p.at(op.in[0], thread, t, 0), p.at(op.in[1], thread, t, 0), op.integers[0],
                               op.integers[1], p.at(op.out[0], thread, t, 0));
}

static const OpKind kind("combine", combine);

#endif

}  // namespace isobit
