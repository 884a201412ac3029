// query: in[0], whole vectors of a slot, in its slot's form for attention; numbers: what scores are
// scaled by.

#include "../engine/engine.h"

namespace isobit {

static void query(const Op& op, Pass& p, int thread, int t, int i) {
    Slot& slot = p.slot(op.in[0]);
    const int D = p.vector(op.in[0]);
    const size_t at = (size_t)t * (op.in[0].width / D) + i;
    float& d = slot.query_scale[at];
    p.kernels.quantise_head(p.at(op.in[0], thread, t, i), D,
                            &slot.query[at * page_layout(D).padded], &d);
    d = d * op.numbers[0];
}

static const OpKind kind("query", query);

}  // namespace isobit
