// clamped_gate: the clamped SwiGLU of gate in[0] and up in[1] to out[0]; integers: length; numbers:
// limit, factor.

#include "../engine.h"

namespace isobit {

static void clamped_gate(const Op& op, Pass& p, int thread, int t, int i) {
    p.kernels.clamped_gate(p.at(op.in[0], thread, t, i), p.at(op.in[1], thread, t, i),
                           op.integers[0], op.numbers[0], op.numbers[1],
                           p.at(op.out[0], thread, t, i));
}

static const OpKind kind("clamped_gate", clamped_gate);

}  // namespace isobit
