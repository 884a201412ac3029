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

    auto rows_of = [](const Matrix& m, const Group& g, int row) {
        return m.data + ((size_t)g.expert * m.rows + row) * m.row_bytes;
    };
    auto multiply = [&](const Matrix& m, const Input& in, const std::vector<int32_t>& x_rows,
                        const Group& g, float* y, int begin, int end, const uint8_t* next) {
        const Job one = job(kernels, planes, m, in, g.count, y, m.rows);
        Product p = one.product;
        p.w = rows_of(m, g, 0);
        p.x_rows = x_rows.data() + g.first;
        p.y_rows = slots_.data() + g.first;
        p.next = next;
        one.f(p, begin, end);
    };

    int step = rows_at_once(n * ffn, team.size());
    int steps = (ffn + step - 1) / step;
    auto item = [&](const Matrix& m, int i) {
        return i < n * steps ? rows_of(m, groups_[i / steps], i % steps * step) : nullptr;
    };
    team.each_and_next(n * steps, [&](int i, int next) {
        const Group& g = groups_[i / steps];
        int begin = i % steps * step, end = std::min(begin + step, ffn);
        multiply(w.gate, x, tokens_, g, gate.data(), begin, end, item(w.up, i));
        multiply(w.up, x, tokens_, g, up.data(), begin, end, item(w.gate, next));
        for (int s = g.first; s < g.first + g.count; ++s) {
            size_t at = (size_t)slots_[s] * ffn + begin;
            kernels.silu_gate(&gate[at], &up[at], end - begin, &swiglu.values[at]);
        }
    });
    team.each(tokens * k, [&](int slot) { swiglu.quantise(kernels, slot, planes); });
    step = rows_at_once(n * hidden, team.size());
    steps = (hidden + step - 1) / step;
    team.each_and_next(n * steps, [&](int i, int next) {
        int begin = i % steps * step, end = std::min(begin + step, hidden);
        multiply(w.down, swiglu, slots_, groups_[i / steps], out.data(), begin, end,
                 item(w.down, next));
    });
}

void Experts::combine(const Kernels& kernels, int token, const float* weights, float* sum) const {
    const size_t first = (size_t)token * k;
    kernels.combine(weights + first, &out[first * hidden], k, hidden, sum);
}

}  // namespace isobit
