// experts: in[0] through each token's experts. One matrix: its product to out[0]. Two, gate and up: to
// out[0] and out[1], and the SwiGLU of both to out[2]. integers: whether all tokens go to one
// expert (a dense feed-forward); whether in[0] has a row for each pair of token and expert.

#include "../engine/engine.h"

namespace isobit {

static void experts(const Phase& phase, Pass& pass, int thread) {
    const Op& op = phase.op;
    const SortedPairs& pairs = pass.sorted_pairs(op.integers[0]);
    const Input& x = pass.slot(op.in[0]).input;
    float* outs[2];
    for (size_t j = 0; j < op.matrices.size(); ++j) outs[j] = pass.at(op.out[j], 0, 0, 0);
    pairs.run(pass.team, pass.kernels, pass.planes, op.matrices.data(), (int)op.matrices.size(), x,
               op.integers[1], outs, [&](int pair, int begin, int end) {
                   const size_t at = (size_t)pair * op.matrices[0].rows + begin;
                   if (op.matrices.size() == 2)
                       pass.kernels.silu_gate(outs[0] + at, outs[1] + at, end - begin,
                                              pass.at(op.out[2], thread, 0, 0) + at);
               });
}

static const PhaseKind kind("experts", experts);

}  // namespace isobit
