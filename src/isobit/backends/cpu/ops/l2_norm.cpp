// l2_norm: in[0] over its length to out[0]; numbers: eps, scale; integers: length.

#include "../engine.h"

namespace isobit {

static void l2_norm(const Op& op, Pass& p, int thread, int t, int i) {
    p.kernels.l2_norm(p.at(op.in[0], thread, t, i), op.integers[0], op.numbers[0], op.numbers[1],
                      p.at(op.out[0], thread, t, i));
}

static const OpKind kind("l2_norm", l2_norm);

}  // namespace isobit
