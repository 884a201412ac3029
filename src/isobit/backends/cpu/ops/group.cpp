// group, after a phase: the pairs of token and expert by expert; in[0]: ids; integers: experts, k.

#include "../engine.h"

namespace isobit {

static void group(const Op& op, Pass& p, int, int, int) {
    p.groups(false).group(p.integers(op.in[0], 0), op.integers[0], p.batch.n_tokens,
                          op.integers[1]);
}

static const OpKind kind("group", group);

}  // namespace isobit
