// gated_add: in[0] + sigmoid(in[2]) * in[1] to out[0]; integers: length.

#include "../engine.h"

namespace isobit {

static void gated_add(const Op& op, Pass& p, int thread, int t, int i) {
    p.kernels.gated_add(p.at(op.in[0], thread, t, i), p.at(op.in[1], thread, t, i),
                        *p.at(op.in[2], thread, t, i), op.integers[0],
                        p.at(op.out[0], thread, t, i));
}

static const OpKind kind("gated_add", gated_add);

}  // namespace isobit
