// silu: of in[0] to out[0]; integers: length.

#include "../engine.h"

namespace isobit {

static void silu(const Op& op, Pass& p, int thread, int t, int i) {
    p.kernels.silu(p.at(op.in[0], thread, t, i), op.integers[0], p.at(op.out[0], thread, t, i));
}

static const OpKind kind("silu", silu);

}  // namespace isobit
