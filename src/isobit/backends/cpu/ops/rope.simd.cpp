// rope: in[0] rotated by table integers[0] to out[0]; of integers[1] values those beyond the
// table as they are; integers[2]: whether pairs are neighbours, not half a vector apart.

#include "../engine/simd_op.h"

#ifndef ISOBIT_LEVEL
#include <string.h>
#endif

namespace isobit {

template <Level>
struct Rotate {
    static void run(const float* x, const float* cos, const float* sin, int n, float* y);
};

#ifdef ISOBIT_LEVEL

template <>
void Rotate<LEVEL>::run(const float* x, const float* cos, const float* sin, int n, float* y) {
    const int half = n / 2;
    for (int i = 0; i < half; ++i) {
        float a = x[i], b = x[i + half];
        y[i] = a * cos[i] - b * sin[i];
        y[i + half] = b * cos[i] + a * sin[i];
    }
}

#else

static void rope(const Op& op, Pass& p, int thread, int t, int i) {
    const RopeRows& table = p.rope(op.integers[0]);
    const size_t at = (size_t)p.batch.positions[t] * table.half;
    const int rotated = 2 * table.half, rest = op.integers[1] - rotated;
    const float* x = p.at(op.in[0], thread, t, i);
    float* y = p.at(op.out[0], thread, t, i);
    const float *cos = table.cos + at, *sin = table.sin + at;
    if (op.integers[2])
        for (int k = 0; k < table.half; ++k) {
            const float a = x[2 * k], b = x[2 * k + 1];
            y[2 * k] = a * cos[k] - b * sin[k];
            y[2 * k + 1] = b * cos[k] + a * sin[k];
        }
    else
        run_of<Rotate>(p.kernels)(x, cos, sin, rotated, y);
    if (rest) memcpy(y + rotated, x + rotated, rest * sizeof(float));
}

static const OpKind kind("rope", rope);

#endif

}  // namespace isobit
