// decay: of in[0] with vectors dt and rate to out[0]; integers: length.

#include "../engine/simd_op.h"

namespace isobit {

// softplus(a + dt) * rate
template <Level>
struct Decay {
    static void run(const float* a, const float* dt, const float* rate, int n, float* g);
};

#ifdef ISOBIT_LEVEL

template <>
void Decay<LEVEL>::run(const float* a, const float* dt, const float* rate, int n, float* g) {
    for (int i = 0; i < n; ++i) {
        const float x = a[i] + dt[i];
        const float u = isobit::exp(x < 0 ? x : -x);
        const float s = u / (2.0f + u), z = s * s;
        float p = 1.0f / 15;
        p = p * z + 1.0f / 13;
        p = p * z + 1.0f / 11;
        p = p * z + 1.0f / 9;
        p = p * z + 1.0f / 7;
        p = p * z + 1.0f / 5;
        p = p * z + 1.0f / 3;
        p = p * z + 1.0f;
        g[i] = ((x > 0 ? x : 0.0f) + (s + s) * p) * rate[i];
    }
}

#else

static void decay(const Op& op, Pass& p, int thread, int t, int i) {
    run_of<Decay>(p.kernels)(p.at(op.in[0], thread, t, i), op.vectors[0], op.vectors[1], op.integers[0],
                    p.at(op.out[0], thread, t, i));
}

static const OpKind kind("decay", decay);

#endif

}  // namespace isobit
