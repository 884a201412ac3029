// relu_squared: of in[0] to out[0]; integers: length.

#include "../engine/engine.h"

namespace isobit {

static void relu_squared(const Op& op, Pass& p, int thread, int t, int i) {
    const float* x = p.at(op.in[0], thread, t, i);
    float* y = p.at(op.out[0], thread, t, i);
    for (int j = 0; j < op.integers[0]; ++j) {
        const float m = x[j] < 0 ? 0 : x[j];  // a NaN stays
        y[j] = m * m;
    }
}

static const OpKind kind("relu_squared", relu_squared);

}  // namespace isobit
