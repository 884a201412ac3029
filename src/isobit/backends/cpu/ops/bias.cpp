// bias: in[0] plus vectors[0] to out[0]; integers: length.

#include "../engine/engine.h"

namespace isobit {

static void bias(const Op& op, Pass& p, int thread, int t, int i) {
    p.kernels.add(p.at(op.in[0], thread, t, i), op.vectors[0], op.integers[0],
                  p.at(op.out[0], thread, t, i));
}

static const OpKind kind("bias", bias);

}  // namespace isobit
