// top_k: the experts of router logits in[0]: weights to out[0], ids to out[1]; out[2]: scratch for the
// probabilities; integers: experts, k, whether the weights add up to 1, which router it is.

#include "../engine.h"

namespace isobit {

static void top_k(const Op& op, Pass& p, int thread, int t, int i) {
    int32_t* ids = p.integers(op.out[1], t);
    p.kernels.top_k(p.at(op.in[0], thread, t, i), op.integers[0], op.integers[1], op.integers[2],
                    ids, p.at(op.out[0], thread, t, i), p.at(op.out[2], thread, t, i));
    p.route(op.integers[3], t, ids, op.integers[1]);
}

static const OpKind kind("top_k", top_k);

}  // namespace isobit
