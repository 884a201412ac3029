// gated_add: in[0] + sigmoid(in[2]) * in[1] to out[0]; integers: length.

#include "../engine/simd_op.h"

namespace isobit {

template <Level>
struct GatedAdd {
    static void run(const float* x, const float* y, float gate, int n, float* out);
};

#ifdef ISOBIT_LEVEL

template <>
void GatedAdd<LEVEL>::run(const float* x, const float* y, float gate, int n, float* out) {
    const float s = sigmoid_of(gate);
    for (int i = 0; i < n; ++i) out[i] = x[i] + s * y[i];
}

#else

static void gated_add(const Op& op, Pass& p, int thread, int t, int i) {
    run_of<GatedAdd>(p.kernels)(p.at(op.in[0], thread, t, i), p.at(op.in[1], thread, t, i),
                        *p.at(op.in[2], thread, t, i), op.integers[0],
                        p.at(op.out[0], thread, t, i));
}

static const OpKind kind("gated_add", gated_add);

#endif

}  // namespace isobit
