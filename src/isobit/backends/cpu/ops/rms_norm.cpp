// rms_norm: in[0] normed with vectors[0] to out[0]; numbers: eps; integers: length.

#include "../engine.h"

namespace isobit {

static void rms_norm(const Op& op, Pass& p, int thread, int t, int i) {
    p.kernels.rms_norm(p.at(op.in[0], thread, t, i), op.vectors[0], op.integers[0], op.numbers[0],
                       p.at(op.out[0], thread, t, i));
}

static const OpKind kind("rms_norm", rms_norm);

}  // namespace isobit
