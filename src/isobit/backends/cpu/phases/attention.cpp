// attention: in: queries in their quantised form; out: [tokens, heads * head_dim]; integers: the cache,
// query heads, the window (0: all positions); vectors: each head's sink, if there are any.

#include <algorithm>

#include "../engine.h"

namespace isobit {

// A work item is QUERY_BLOCK query vectors of one key-value head and one sequence: the heads of its
// group for one token, then for the next.
static void attention(const Phase& phase, Pass& pass, int) {
    const Op& op = phase.op;
    const Batch& b = pass.batch;
    const Cache& cache = pass.cache(op.integers[0]);
    const int H = op.integers[1], G = cache.heads, T = b.n_tokens, group = H / G;
    const int D = cache.layout.head_dim, padded = cache.layout.padded;
    const int window = op.integers[2];
    const float* sinks = op.vectors.empty() ? nullptr : op.vectors[0];
    const Slot& q = pass.slot(op.in[0]);
    auto blocks = [&](int tokens) {
        return (tokens * group + QUERY_BLOCK - 1) / QUERY_BLOCK * G;
    };
    auto end_of = [&](int t) {
        int end = t;
        while (end < T && b.sequence[end] == b.sequence[t]) ++end;
        return end;
    };
    int items = 0;
    for (int t = 0; t < T; t = end_of(t)) items += blocks(end_of(t) - t);
    pass.team.each(items, [&](int i) {
        int first = 0, end = end_of(0);
        for (; i >= blocks(end - first); first = end, end = end_of(first))
            i -= blocks(end - first);
        const int g = i % G, n = (end - first) * group;
        Query queries[QUERY_BLOCK];
        int count = 0;
        for (int j = i / G * QUERY_BLOCK; j < n && count < QUERY_BLOCK; ++j) {
            const int t = first + j / group, h = g * group + j % group;
            const size_t at = (size_t)t * H + h;
            const int position = b.positions[t], beyond = window ? position - window + 1 : 0;
            queries[count++] = {&q.query[at * padded], q.query_scale[at], std::max(beyond, 0),
                                position, sinks ? sinks + h : nullptr,
                                pass.at(op.out[0], 0, t, 0) + h * D};
        }
        const Pages pages = {pass.page(cache, 0, g), G * cache.layout.bytes,
                             b.pages + (size_t)b.sequence[first] * b.pages_per_sequence};
        pass.kernels.attention(cache.layout, pages, queries, count);
    });
}

static const PhaseKind kind("attention", attention);

}  // namespace isobit
