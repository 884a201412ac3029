// sigmoid_gate: in[0], heads side by side, times the sigmoid of in[1], a vector for each head, to out[0];
// integers: heads, length of each.

#include "../engine/simd_op.h"

namespace isobit {

template <Level>
struct SigmoidGate {
    static void run(const float* x, const float* gate, int n, float* y);
};

#ifdef ISOBIT_LEVEL

template <>
void SigmoidGate<LEVEL>::run(const float* x, const float* gate, int n, float* y) {
    for (int i = 0; i < n; ++i) y[i] = x[i] * sigmoid_of(gate[i]);
}

#else

static void sigmoid_gate(const Op& op, Pass& p, int thread, int t, int i) {
    const int n = op.integers[1];
    for (int h = 0; h < op.integers[0]; ++h)
        run_of<SigmoidGate>(p.kernels)(p.at(op.in[0], thread, t, i) + h * n, p.at(op.in[1], thread, t, h),
                               n, p.at(op.out[0], thread, t, i) + h * n);
}

static const OpKind kind("sigmoid_gate", sigmoid_gate);

#endif

}  // namespace isobit
