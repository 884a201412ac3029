#include "moe.h"

namespace isobit {

void SortedPairs::sort(const int32_t* ids, int begin, int end, int tokens, int k) {
    const int pairs = tokens * k, experts = end - begin;
    auto here = [&](int s) { return ids[s] >= begin && ids[s] < end; };
    sorted_pairs_.resize(pairs), tokens_.resize(pairs);
    first_.assign(experts + 1, 0);
    for (int s = 0; s < pairs; ++s)
        if (here(s)) ++first_[ids[s] - begin + 1];
    experts_with_pairs_.clear();
    for (int e = 0; e < experts; ++e) {
        if (first_[e + 1]) experts_with_pairs_.push_back({e, first_[e], first_[e + 1]});
        first_[e + 1] += first_[e];
    }
    for (int s = 0; s < pairs; ++s) {
        if (!here(s)) continue;
        int at = first_[ids[s] - begin]++;
        sorted_pairs_[at] = s;
        tokens_[at] = s / k;
    }
}

void SortedPairs::one_for_all(int tokens) {
    if ((int)ids_.size() == tokens) return;
    ids_.assign(tokens, 0);
    sort(ids_.data(), 0, 1, tokens, 1);
}

}  // namespace isobit
