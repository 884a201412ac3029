// copy: a vector of in[0] to out[0], for products, whose rows lie one behind the other; integers: length.

#include <algorithm>

#include "../engine/engine.h"

namespace isobit {

static void copy(const Op& op, Pass& p, int thread, int t, int i) {
    std::copy_n(p.at(op.in[0], thread, t, i), op.integers[0], p.at(op.out[0], thread, t, i));
}

static const OpKind kind("copy", copy);

}  // namespace isobit
