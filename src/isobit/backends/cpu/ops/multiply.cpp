// multiply: in[0] * in[1] to out[0]; integers: length.

#include "../engine/engine.h"

namespace isobit {

static void multiply(const Op& op, Pass& p, int thread, int t, int i) {
    const float* x = p.at(op.in[0], thread, t, i);
    const float* y = p.at(op.in[1], thread, t, i);
    float* z = p.at(op.out[0], thread, t, i);
    for (int j = 0; j < op.integers[0]; ++j) z[j] = x[j] * y[j];
}

static const OpKind kind("multiply", multiply);

}  // namespace isobit
