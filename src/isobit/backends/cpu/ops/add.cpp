// add: in[0] + in[1] to out[0]; integers: length.

#include "../engine/engine.h"

namespace isobit {

static void add(const Op& op, Pass& p, int thread, int t, int i) {
    p.kernels.add(p.at(op.in[0], thread, t, i), p.at(op.in[1], thread, t, i), op.integers[0],
                  p.at(op.out[0], thread, t, i));
}

static const OpKind kind("add", add);

}  // namespace isobit
