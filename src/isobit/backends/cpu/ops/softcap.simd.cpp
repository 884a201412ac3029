// softcap: of in[0] to out[0]; integers: length; numbers: cap.

#include "../engine/simd_op.h"

namespace isobit {

template <Level>
struct SoftCap {
    static void run(const float* x, int n, float cap, float* y);
};

#ifdef ISOBIT_LEVEL

template <>
void SoftCap<LEVEL>::run(const float* x, int n, float cap, float* y) {
    for (int i = 0; i < n; ++i) y[i] = isobit::softcap(x[i], cap);
}

#else

static void softcap(const Op& op, Pass& p, int thread, int t, int i) {
    run_of<SoftCap>(p.kernels)(p.at(op.in[0], thread, t, i), op.integers[0], op.numbers[0],
                               p.at(op.out[0], thread, t, i));
}

static const OpKind kind("softcap", softcap);

#endif

}  // namespace isobit
