// top_k: the experts of router logits in[0]: weights to out[0], ids to out[1]; out[2]: scratch for the
// probabilities, and as many keys; integers: experts, k, whether the weights add up to 1, which router it
// is, whether in[0] are logits, groups of experts, how many are used; vectors: the bias, if there is one.

#include "../engine.h"

namespace isobit {

static void top_k(const Op& op, Pass& p, int thread, int t, int i) {
    int32_t* ids = p.integers(op.out[1], t);
    const int experts = op.integers[0];
    const Routing choice = {op.integers[1],     op.integers[2] != 0, op.integers[4] != 0,
                           op.integers[5],     op.integers[6],
                           op.vectors.empty() ? nullptr : (const float*)op.vectors[0]};
    float* scratch = p.at(op.out[2], thread, t, i);
    p.kernels.top_k(p.at(op.in[0], thread, t, i), experts, choice, ids,
                    p.at(op.out[0], thread, t, i), scratch, (int32_t*)(scratch + experts));
    p.route(op.integers[3], t, ids, choice.k);
}

static const OpKind kind("top_k", top_k);

}  // namespace isobit
