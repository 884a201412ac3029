// gelu_gate: GELU of gate in[0] times up in[1] to out[0]; integers: length.

#include "../engine/simd_op.h"

namespace isobit {

template <Level>
struct GeluGate {
    static void run(const float* gate, const float* up, int n, float* y);
};

#ifdef ISOBIT_LEVEL

template <>
void GeluGate<LEVEL>::run(const float* gate, const float* up, int n, float* y) {
    for (int i = 0; i < n; ++i) y[i] = isobit::gelu_gate(gate[i], up[i]);
}

#else

static void gelu_gate(const Op& op, Pass& p, int thread, int t, int i) {
    run_of<GeluGate>(p.kernels)(p.at(op.in[0], thread, t, i), p.at(op.in[1], thread, t, i),
                                op.integers[0], p.at(op.out[0], thread, t, i));
}

static const OpKind kind("gelu_gate", gelu_gate);

#endif

}  // namespace isobit
