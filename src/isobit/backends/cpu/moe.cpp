#include "moe.h"

#include <algorithm>

namespace isobit {

void Experts::resize(int tokens_now, int k_, int ffn_, int hidden_) {
    tokens = tokens_now, k = k_, ffn = ffn_, hidden = hidden_;
    const size_t slots = (size_t)tokens * k;
    if (gate.size() < slots * ffn) gate.resize(slots * ffn), up.resize(slots * ffn);
    if (out.size() < slots * hidden) out.resize(slots * hidden);
    swiglu.resize((int)slots, ffn);
    slots_.resize(slots), tokens_.resize(slots);
}

void Experts::group(const int32_t* ids, int experts) {
    const int slots = tokens * k;
    first_.assign(experts + 1, 0);
    for (int s = 0; s < slots; ++s) ++first_[ids[s] + 1];
    groups_.clear();
    for (int e = 0; e < experts; ++e) {
        if (first_[e + 1]) groups_.push_back({e, first_[e], first_[e + 1]});
        first_[e + 1] += first_[e];
    }
    for (int s = 0; s < slots; ++s) {
        int at = first_[ids[s]]++;
        slots_[at] = s;
        tokens_[at] = s / k;
    }
}

void Experts::run(Team& team, const Kernels& kernels, int planes, const FeedForward& w,
                  const Input& x) {
    const int n = (int)groups_.size();

    auto product = [&](const Matrix& m, const Input& in, const std::vector<int32_t>& x_rows,
                       const Group& g, float* y) {
        Product p = job(kernels, planes, m, in, g.count, y, m.rows).product;
        p.w += (size_t)g.expert * m.rows * m.row_bytes;
        p.x_rows = x_rows.data() + g.first;
        p.y_rows = slots_.data() + g.first;
        return p;
    };

    int step = rows_at_once(n * ffn, team.size());
    int steps = (ffn + step - 1) / step;
    team.each(n * steps, [&](int i) {
        const Group& g = groups_[i / steps];
        int begin = i % steps * step, end = std::min(begin + step, ffn);
        kernels.matmul(w.gate.type, planes)(product(w.gate, x, tokens_, g, gate.data()), begin, end);
        kernels.matmul(w.up.type, planes)(product(w.up, x, tokens_, g, up.data()), begin, end);
        for (int s = g.first; s < g.first + g.count; ++s) {
            size_t at = (size_t)slots_[s] * ffn + begin;
            kernels.silu_gate(&gate[at], &up[at], end - begin, &swiglu.values[at]);
        }
    });
    team.each(tokens * k, [&](int slot) { swiglu.quantise(kernels, slot, planes); });
    step = rows_at_once(n * hidden, team.size());
    steps = (hidden + step - 1) / step;
    team.each(n * steps, [&](int i) {
        const Group& g = groups_[i / steps];
        int begin = i % steps * step, end = std::min(begin + step, hidden);
        kernels.matmul(w.down.type, planes)(product(w.down, swiglu, slots_, g, out.data()), begin,
                                            end);
    });
}

void Experts::combine(Team& team, const Kernels& kernels, const float* weights, float* sum) {
    team.each(tokens, [&](int t) {
        kernels.combine(weights + (size_t)t * k, &out[(size_t)t * k * hidden], k, hidden,
                        sum + (size_t)t * hidden);
    });
}

}  // namespace isobit
