// The router's choice and the weighted sum of experts, docs/numerics.md section 7.
#pragma once

namespace isobit::ISOBIT_SIMD {

constexpr int32_t NOT_LEFT = INT32_MIN;  // below every key

// An integer that compares as the score does; a NaN has one too.
static int32_t key_of(float score) {
    const int32_t b = (int32_t)isobit::bits(score), key = b < 0 ? b ^ INT32_MAX : b;
    return key > NOT_LEFT ? key : NOT_LEFT + 1;
}
static float score_of(int32_t key) {
    return isobit::from_bits((uint32_t)(key < 0 ? key ^ INT32_MAX : key));
}

// The first place of the largest of n keys.
static int best_of(const int32_t* keys, int n) {
    int at = 0;
    for (int i = 1; i < n; ++i) at = keys[i] > keys[at] ? i : at;
    return at;
}

// Only the best groups' keys are left. alone: a group is as good as its best, else the second added.
static void leave_groups(int32_t* keys, int size, int groups, int used, bool alone) {
    int32_t scores[64];
    for (int g = 0; g < groups; ++g) {
        int32_t* of = keys + g * size;
        const int first = best_of(of, size);
        const int32_t most = of[first];
        of[first] = NOT_LEFT;
        scores[g] = alone ? most : key_of(score_of(most) + score_of(of[best_of(of, size)]));
        of[first] = most;
    }
    for (int n = 0; n < used; ++n) scores[best_of(scores, groups)] = NOT_LEFT;
    for (int g = 0; g < groups; ++g)
        for (int i = 0; i < size && scores[g] != NOT_LEFT; ++i) keys[g * size + i] = NOT_LEFT;
}

// p: room for the n probabilities, a result too; keys: room for n. NaN logits still give k distinct
// ids.
static void top_k(const float* z, int n, const Routing& c, int32_t* ids, float* weights, float* p,
                  int32_t* keys) {
    if (c.softmax) {
        float m = z[0];
        for (int i = 1; i < n; ++i) m = z[i] > m ? z[i] : m;
        for (int i = 0; i < n; ++i) p[i] = isobit::exp(z[i] - m);
        const float all = sum256(p, n);
        for (int i = 0; i < n; ++i) p[i] = p[i] / all;
    } else {
        for (int i = 0; i < n; ++i) p[i] = z[i];
    }
    for (int i = 0; i < n; ++i) keys[i] = key_of(p[i] + (c.bias ? c.bias[i] : 0.0f));
    if (c.groups_used < c.groups) leave_groups(keys, n / c.groups, c.groups, c.groups_used, c.softmax);
    float chosen = 0;
    for (int rank = 0; rank < c.k; ++rank) {
        const int best = best_of(keys, n);
        ids[rank] = best;
        weights[rank] = p[best];
        chosen = chosen + p[best];
        keys[best] = NOT_LEFT;
    }
    chosen = chosen < 0x1p-14f ? 0x1p-14f : chosen;
    for (int rank = 0; rank < c.k && c.normalise; ++rank) weights[rank] = weights[rank] / chosen;
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
