// decay: of in[0] with vectors dt and rate to out[0]; integers: length.

#include "../engine.h"

namespace isobit {

static void decay(const Op& op, Pass& p, int thread, int t, int i) {
    p.kernels.decay(p.at(op.in[0], thread, t, i), op.vectors[0], op.vectors[1], op.integers[0],
                    p.at(op.out[0], thread, t, i));
}

static const OpKind kind("decay", decay);

}  // namespace isobit
