// rope: in[0] rotated by the batch's table integers[0] to out[0]; of integers[1] values those beyond the
// table as they are.

#include <string.h>

#include "../engine.h"

namespace isobit {

static void rope(const Op& op, Pass& p, int thread, int t, int i) {
    const RopeRows& table = p.batch.rope[op.integers[0]];
    const size_t at = (size_t)t * table.half;
    const int turned = 2 * table.half, rest = op.integers[1] - turned;
    const float* x = p.at(op.in[0], thread, t, i);
    float* y = p.at(op.out[0], thread, t, i);
    p.kernels.rope(x, table.cos + at, table.sin + at, turned, y);
    if (rest) memcpy(y + turned, x + turned, rest * sizeof(float));
}

static const OpKind kind("rope", rope);

}  // namespace isobit
