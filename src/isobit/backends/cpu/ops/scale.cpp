// scale: in[0] times vectors[0] to out[0]. expert_scale: vector i of in[0] times the number in
// vectors[0] of the expert that in[1] names i-th. Integers of both: length.

#include "../engine/engine.h"

namespace isobit {

static void scale(const Op& op, Pass& p, int thread, int t, int i) {
    const float *x = p.at(op.in[0], thread, t, i), *by = op.vectors[0];
    float* y = p.at(op.out[0], thread, t, i);
    for (int k = 0; k < op.integers[0]; ++k) y[k] = x[k] * by[k];
}

static void expert_scale(const Op& op, Pass& p, int thread, int t, int i) {
    const float *x = p.at(op.in[0], thread, t, i), by = op.vectors[0][p.integers(op.in[1], t)[i]];
    float* y = p.at(op.out[0], thread, t, i);
    for (int k = 0; k < op.integers[0]; ++k) y[k] = x[k] * by;
}

static const OpKind kind("scale", scale), of_experts("expert_scale", expert_scale);

}  // namespace isobit
