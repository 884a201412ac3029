// group, after a phase: the pairs of token and expert by expert; in[0]: ids; integers: the first
// expert and the end of those that are here, k.

#include "../engine/engine.h"

namespace isobit {

static void group(const Op& op, Pass& p, int, int, int) {
    p.sorted_pairs(false).sort(p.integers(op.in[0], 0), op.integers[0], op.integers[1],
                          p.batch.n_tokens, op.integers[2]);
}

static const OpKind kind("group", group);

}  // namespace isobit
