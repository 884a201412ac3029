// l2_norm: in[0] over its length to out[0]; numbers: eps, scale; integers: length.

#include "../engine/simd_op.h"

namespace isobit {

template <Level>
struct L2Norm {
    static void run(const float* x, int n, float eps, float scale, float* y);
};

#ifdef ISOBIT_LEVEL

template <>
void L2Norm<LEVEL>::run(const float* x, int n, float eps, float scale, float* y) {
    Lanes256 lanes;
    for (int k = 0; k < n; k += 256)
        for (int i = 0; i < 256 && k + i < n; ++i) lanes.v[i] += x[k + i] * x[k + i];
    const float r = 1.0f / __builtin_sqrtf(lanes.sum() + eps);
    for (int i = 0; i < n; ++i) y[i] = (x[i] * r) * scale;
}

#else

static void l2_norm(const Op& op, Pass& p, int thread, int t, int i) {
    run_of<L2Norm>(p.kernels)(p.at(op.in[0], thread, t, i), op.integers[0], op.numbers[0], op.numbers[1],
                      p.at(op.out[0], thread, t, i));
}

static const OpKind kind("l2_norm", l2_norm);

#endif

}  // namespace isobit
