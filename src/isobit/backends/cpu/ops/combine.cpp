// combine: the sum of in[1], a vector for each expert, by the weights in[0] to out[0]; integers: k,
// length.

#include "../engine.h"

namespace isobit {

static void combine(const Op& op, Pass& p, int thread, int t, int) {
    p.kernels.combine(p.at(op.in[0], thread, t, 0), p.at(op.in[1], thread, t, 0), op.integers[0],
                      op.integers[1], p.at(op.out[0], thread, t, 0));
}

static const OpKind kind("combine", combine);

}  // namespace isobit
