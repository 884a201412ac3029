// sigmoid_gate: in[0], heads side by side, times the sigmoid of in[1], a vector for each head, to out[0];
// integers: heads, length of each.

#include "../engine.h"

namespace isobit {

static void sigmoid_gate(const Op& op, Pass& p, int thread, int t, int i) {
    const int n = op.integers[1];
    for (int h = 0; h < op.integers[0]; ++h)
        p.kernels.sigmoid_gate(p.at(op.in[0], thread, t, i) + h * n, p.at(op.in[1], thread, t, h),
                               n, p.at(op.out[0], thread, t, i) + h * n);
}

static const OpKind kind("sigmoid_gate", sigmoid_gate);

}  // namespace isobit
