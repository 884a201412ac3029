// clamped_gate: the clamped SwiGLU of gate in[0] and up in[1] to out[0]; integers: length; numbers:
// limit, factor.

#include "../engine/simd_op.h"

namespace isobit {

template <Level>
struct ClampedGate {
    static void run(const float* gate, const float* up, int n, float limit, float factor, float* y);
};

#ifdef ISOBIT_LEVEL

template <>
void ClampedGate<LEVEL>::run(const float* gate, const float* up, int n, float limit, float factor, float* y) {
    for (int i = 0; i < n; ++i) {
        float g = gate[i] > limit ? limit : gate[i], u = up[i] > limit ? limit : up[i];
        u = u < -limit ? -limit : u;
        y[i] = (g / (1.0f + isobit::exp(-(g * factor)))) * (u + 1.0f);
    }
}

#else

static void clamped_gate(const Op& op, Pass& p, int thread, int t, int i) {
    run_of<ClampedGate>(p.kernels)(p.at(op.in[0], thread, t, i), p.at(op.in[1], thread, t, i),
                           op.integers[0], op.numbers[0], op.numbers[1],
                           p.at(op.out[0], thread, t, i));
}

static const OpKind kind("clamped_gate", clamped_gate);

#endif

}  // namespace isobit
