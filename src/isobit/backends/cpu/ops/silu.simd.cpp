// silu: of in[0] to out[0]; integers: length.

#include "../engine/simd_op.h"

namespace isobit {

template <Level>
struct Silu {
    static void run(const float* x, int n, float* y);
};

#ifdef ISOBIT_LEVEL

template <>
void Silu<LEVEL>::run(const float* x, int n, float* y) {
    for (int i = 0; i < n; ++i) y[i] = x[i] / (1.0f + isobit::exp(-x[i]));
}

#else

static void silu(const Op& op, Pass& p, int thread, int t, int i) {
    run_of<Silu>(p.kernels)(p.at(op.in[0], thread, t, i), op.integers[0], p.at(op.out[0], thread, t, i));
}

static const OpKind kind("silu", silu);

#endif

}  // namespace isobit
