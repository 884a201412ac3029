// The router's choice and the weighted sum of experts, docs/numerics.md section 7.
#pragma once

namespace isobit::ISOBIT_SIMD {

// p: room for the n probabilities, a result too. NaN logits still give k distinct ids.
static void top_k(const float* z, int n, int k, bool normalise, int32_t* ids, float* weights,
                  float* p) {
    float m = z[0];
    for (int i = 1; i < n; ++i) m = z[i] > m ? z[i] : m;
    for (int i = 0; i < n; ++i) p[i] = isobit::exp(z[i] - m);
    const float all = sum256(p, n);
    for (int i = 0; i < n; ++i) p[i] = p[i] / all;
    float chosen = 0;
    for (int rank = 0; rank < k; ++rank) {
        int best = -1;
        for (int i = 0; i < n; ++i)
            if (!(p[i] < 0) && (best < 0 || p[i] > p[best])) best = i;  // a NaN may be chosen
        ids[rank] = best;
        weights[rank] = p[best];
        chosen = chosen + p[best];
        p[best] = -1;  // taken
    }
    for (int rank = 0; rank < k; ++rank) p[ids[rank]] = weights[rank];  // as it was
    if (normalise)
        for (int rank = 0; rank < k; ++rank) weights[rank] = weights[rank] / chosen;
}

// y: k rows of n.
static void combine(const float* weights, const float* y, int k, int n, float* out) {
    for (int i = 0; i < n; ++i) out[i] = 0;
    for (int rank = 0; rank < k; ++rank) {
        const float w = weights[rank];
        const float* row = y + (size_t)rank * n;
        for (int i = 0; i < n; ++i) out[i] = out[i] + w * row[i];
    }
}

}  // namespace isobit::ISOBIT_SIMD
