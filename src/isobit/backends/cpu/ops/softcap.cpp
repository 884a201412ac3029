// softcap: of in[0] to out[0]; integers: length; numbers: cap.

#include "../engine.h"

namespace isobit {

static void softcap(const Op& op, Pass& p, int thread, int t, int i) {
    p.kernels.softcap(p.at(op.in[0], thread, t, i), op.integers[0], op.numbers[0],
                      p.at(op.out[0], thread, t, i));
}

static const OpKind kind("softcap", softcap);

}  // namespace isobit
