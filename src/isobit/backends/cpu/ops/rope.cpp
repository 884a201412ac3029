// rope: in[0] rotated by the batch's table integers[0] to out[0].

#include "../engine.h"

namespace isobit {

static void rope(const Op& op, Pass& p, int thread, int t, int i) {
    const RopeRows& table = p.batch.rope[op.integers[0]];
    const size_t at = (size_t)t * table.half;
    p.kernels.rope(p.at(op.in[0], thread, t, i), table.cos + at, table.sin + at, 2 * table.half,
                   p.at(op.out[0], thread, t, i));
}

static const OpKind kind("rope", rope);

}  // namespace isobit
