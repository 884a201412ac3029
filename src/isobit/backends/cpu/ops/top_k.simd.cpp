// top_k: the experts of router logits in[0]: weights to out[0], ids to out[1]; out[2]: scratch for the
// probabilities, and as many keys; integers: experts, k, whether the weights add up to 1, which router it
// is, whether in[0] are logits, groups of experts, how many are used; vectors: the bias, if there is one.

#include "../engine/simd_op.h"

namespace isobit {

// How experts are chosen: see isobit.numerics.ops.TopK.
struct Routing {
    int k;
    bool normalise, softmax = true;
    int groups = 1, groups_used = 1;
    const float* bias = nullptr;  // or null
};

// p: room for the n probabilities, a result too; keys: room for n. NaN logits still give k distinct ids.
template <Level>
struct Choose {
    static void run(const float* z, int n, const Routing&, int32_t* ids, float* weights, float* p,
                    int32_t* keys);
};

#ifdef ISOBIT_LEVEL

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

template <>
void Choose<LEVEL>::run(const float* z, int n, const Routing& c, int32_t* ids, float* weights, float* p,
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

#else

static void top_k(const Op& op, Pass& p, int thread, int t, int i) {
    int32_t* ids = p.integers(op.out[1], t);
    const int experts = op.integers[0];
    const Routing choice = {op.integers[1],     op.integers[2] != 0, op.integers[4] != 0,
                           op.integers[5],     op.integers[6],
                           op.vectors.empty() ? nullptr : (const float*)op.vectors[0]};
    float* scratch = p.at(op.out[2], thread, t, i);
    run_of<Choose>(p.kernels)(p.at(op.in[0], thread, t, i), experts, choice, ids,
                              p.at(op.out[0], thread, t, i), scratch, (int32_t*)(scratch + experts));
    p.route(op.integers[3], t, ids, choice.k);
}

static const OpKind kind("top_k", top_k);

#endif

}  // namespace isobit
