// receive: row t of what the batch brings to out[0]. integers: its width.

#include <string.h>

#include "../engine/engine.h"

namespace isobit {

static void receive(const Op& op, Pass& p, int thread, int t, int i) {
    const size_t width = op.integers[0];
    memcpy(p.at(op.out[0], thread, t, i), p.batch.received + t * width, width * sizeof(float));
}

static const OpKind kind("receive", receive);

}  // namespace isobit
