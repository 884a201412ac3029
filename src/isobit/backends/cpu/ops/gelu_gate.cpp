// gelu_gate: GELU of gate in[0] times up in[1] to out[0]; integers: length.

#include "../engine.h"

namespace isobit {

static void gelu_gate(const Op& op, Pass& p, int thread, int t, int i) {
    p.kernels.gelu_gate(p.at(op.in[0], thread, t, i), p.at(op.in[1], thread, t, i), op.integers[0],
                        p.at(op.out[0], thread, t, i));
}

static const OpKind kind("gelu_gate", gelu_gate);

}  // namespace isobit
