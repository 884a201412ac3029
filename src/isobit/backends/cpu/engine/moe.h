// Pairs of a token and an expert, grouped by expert, so that each expert's weights are read once for all
// its tokens. A dense feed-forward is one expert that every token goes to.
#pragma once

#include <algorithm>
#include <vector>

#include "matmul.h"

namespace isobit {

class SortedPairs {
public:
    // One thread: sorts the pairs (token * k + rank) by expert; ids is [tokens, k]. Those of experts
    // that are not among begin … end - 1 are left out; a group's expert is counted from begin.
    void sort(const int32_t* ids, int begin, int end, int tokens, int k);

    // All tokens to expert 0.
    void one_for_all(int tokens);

    // Every thread of the team: each matrix (a stack, one for each expert) times x, whose rows are
    // pairs or tokens, to a row for each pair; done(pair, begin, end) when these columns are there.
    template <class F>
    void run(Team& team, const Kernels& kernels, int planes, const Matrix* matrices, int count,
             const Input& x, bool by_pair, float* const* outs, F&& done) const;

private:
    struct Group {
        int expert, first, count;
    };
    std::vector<Group> experts_with_pairs_;
    std::vector<int32_t> sorted_pairs_, tokens_;  // by expert: the pair, and its token
    std::vector<int> first_;
    std::vector<int32_t> ids_;
};

template <class F>
void SortedPairs::run(Team& team, const Kernels& kernels, int planes, const Matrix* matrices, int count,
                 const Input& x, bool by_pair, float* const* outs, F&& done) const {
    const int n = (int)experts_with_pairs_.size(), rows = matrices[0].rows;
    const std::vector<int32_t>& x_rows = by_pair ? sorted_pairs_ : tokens_;
    auto rows_of = [](const Matrix& m, const Group& g, int row) {
        return m.data + ((size_t)g.expert * m.rows + row) * m.row_bytes;
    };
    Job jobs[2];  // gate and up; what a matrix's format needs is looked up once
    for (int j = 0; j < count; ++j)
        jobs[j] = job(kernels, planes, matrices[j], x, 0, outs[j], matrices[j].rows);
    const int step = rows_at_once(n * rows, team.members());
    const int steps = (rows + step - 1) / step;
    auto item = [&](const Matrix& m, int i) {
        return i < n * steps ? rows_of(m, experts_with_pairs_[i / steps], i % steps * step) : nullptr;
    };
    team.parallel_for_with_prefetch(n * steps, [&](int i, int next) {
        const Group& g = experts_with_pairs_[i / steps];
        const int begin = i % steps * step, end = std::min(begin + step, rows);
        for (int j = 0; j < count; ++j) {
            Product p = jobs[j].product;
            p.tokens = g.count;
            p.w = rows_of(matrices[j], g, 0);
            p.x_rows = x_rows.data() + g.first;
            p.y_rows = sorted_pairs_.data() + g.first;
            p.next = j + 1 < count ? item(matrices[j + 1], i) : item(matrices[0], next);
            jobs[j].f(p, begin, end);
        }
        for (int s = g.first; s < g.first + g.count; ++s) done(sorted_pairs_[s], begin, end);
    });
}

}  // namespace isobit
