// quantise: in[0], whole vectors of a slot, in its slot's form for products.

#include "../engine/engine.h"

namespace isobit {

static void quantise(const Op& op, Pass& p, int, int t, int i) {
    p.slot(op.in[0]).input.quantise(p.kernels, t * (op.in[0].width / p.vector(op.in[0])) + i,
                                    p.planes);
}

static const OpKind kind("quantise", quantise);

}  // namespace isobit
