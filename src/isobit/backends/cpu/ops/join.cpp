// join: a vector of in[0], then one of in[1], to out[0]; integers: their lengths, and how many heads have
// the same vector of in[0].

#include <algorithm>

#include "../engine/engine.h"

namespace isobit {

static void join(const Op& op, Pass& p, int thread, int t, int i) {
    const int a = op.integers[0], b = op.integers[1];
    float* to = p.at(op.out[0], thread, t, i);
    std::copy_n(p.at(op.in[0], thread, t, i / op.integers[2]), a, to);
    std::copy_n(p.at(op.in[1], thread, t, i), b, to + a);
}

static const OpKind kind("join", join);

}  // namespace isobit
