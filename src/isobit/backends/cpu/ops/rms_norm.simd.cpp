// rms_norm: in[0] normed with vectors[0] to out[0]; numbers: eps; integers: length.

#include "../engine/simd_op.h"

namespace isobit {

template <Level>
struct RmsNorm {
    static void run(const float* x, const float* weight, int n, float eps, float* y);
};

#ifdef ISOBIT_LEVEL

template <>
void RmsNorm<LEVEL>::run(const float* x, const float* weight, int n, float eps, float* y) {
    Lanes256 lanes;
    for (int k = 0; k < n; k += 256)
        for (int i = 0; i < 256 && k + i < n; ++i) lanes.v[i] += x[k + i] * x[k + i];
    float r = 1.0f / __builtin_sqrtf(lanes.sum() / (float)n + eps);
    for (int i = 0; i < n; ++i) y[i] = (x[i] * r) * weight[i];
}

#else

static void rms_norm(const Op& op, Pass& p, int thread, int t, int i) {
    run_of<RmsNorm>(p.kernels)(p.at(op.in[0], thread, t, i), op.vectors[0], op.integers[0],
                               op.numbers[0], p.at(op.out[0], thread, t, i));
}

static const OpKind kind("rms_norm", rms_norm);

#endif

}  // namespace isobit
