// expert_bias: in[0] plus the row of vectors[0] that the ids in[1] choose, to out[0]; integers: length.

#include "../engine/engine.h"

namespace isobit {

static void expert_bias(const Op& op, Pass& p, int thread, int t, int i) {
    const int n = op.integers[0];
    p.kernels.add(p.at(op.in[0], thread, t, i),
                  op.vectors[0] + (size_t)p.integers(op.in[1], t)[i] * n, n,
                  p.at(op.out[0], thread, t, i));
}

static const OpKind kind("expert_bias", expert_bias);

}  // namespace isobit
