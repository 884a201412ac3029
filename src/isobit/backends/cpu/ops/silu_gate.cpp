// silu_gate: SwiGLU of gate in[0] and up in[1] to out[0]; integers: length.

#include "../engine/engine.h"

namespace isobit {

static void silu_gate(const Op& op, Pass& p, int thread, int t, int i) {
    p.kernels.silu_gate(p.at(op.in[0], thread, t, i), p.at(op.in[1], thread, t, i), op.integers[0],
                        p.at(op.out[0], thread, t, i));
}

static const OpKind kind("silu_gate", silu_gate);

}  // namespace isobit
