// Passes of many sequences on several threads: each thread runs all of the pass for some of the
// sequences, and waits for no other but at the end. What a batch is cut into changes no bit.
//
// A team that meets after each phase shares every read of the weights, but one thread that another
// program keeps from running holds all of them up some hundred times a pass. Where the weights lie in
// the processor's caches, lanes read them again for little.

#include <algorithm>
#include <numeric>

#include "engine.h"

namespace isobit {

namespace {

// What a token, and a row of logits, cost about: as much as attending to so many positions.
constexpr int TOKEN_COST = 320, ROW_COST = 180;

// Some tokens of a batch, with their rows.
struct Part {
    Part(const Batch& b, const Rows& r, const Program& program, int begin, int end) : batch(b), rows(r) {
        const int32_t *first = b.logit_rows, *last = first + b.n_logit_rows;
        const size_t at = std::lower_bound(first, last, begin) - first;
        for (size_t i = at; first + i < last && first[i] < end; ++i) wanted.push_back(first[i] - begin);
        batch.n_tokens = end - begin;
        batch.n_logit_rows = (int)wanted.size();
        batch.logit_rows = wanted.data();
        batch.tokens += begin;
        batch.positions += begin;
        batch.sequence += begin;
        if (b.routes)
            batch.routes += (size_t)begin * program.routers * program.routed * b.route_bytes;
        rows.argmax += at;
        if (r.places) rows.places += at;
        else if (r.logits) rows.logits += at * program.vocab;
        if (r.ids) {
            rows.ids += at * r.n_ids;
            rows.values += at * r.n_ids;
        }
        if (r.k) {
            rows.top_ids += at * r.k;
            rows.top += at * r.k;
        }
        if (r.digests) rows.digests += at * DIGEST_BYTES;
        if (r.hidden) rows.hidden += at * program.hidden_width;
    }

    std::vector<int32_t> wanted;
    Batch batch;
    Rows rows;
};

// Where a batch is cut into so many parts that take about as long: at the ends of those sequences
// that are nearest to it. Empty if a sequence is too long.
std::vector<int> cuts(const Batch& b, int parts) {
    std::vector<long> cost(b.n_tokens);
    for (int t = 0; t < b.n_tokens; ++t) cost[t] = TOKEN_COST + b.positions[t];
    for (int r = 0; r < b.n_logit_rows; ++r) cost[b.logit_rows[r]] += ROW_COST;
    const long total = std::accumulate(cost.begin(), cost.end(), 0L);
    std::vector<int> ends{0};
    long begun = 0, before = 0, done = 0, longest = 0;
    int end = 0;  // of the sequence before
    auto cut = [&](int at, long spent) {
        ends.push_back(at);
        longest = std::max(longest, spent - begun);
        begun = spent;
    };
    for (int t = 0; t < b.n_tokens; ++t) {
        done += cost[t];
        const bool last = t + 1 == b.n_tokens;
        if (!last && b.sequence[t + 1] == b.sequence[t]) continue;
        const long share = total * (long)ends.size() / parts;
        if ((int)ends.size() < parts && done >= share) {
            const bool first = end == ends.back();
            if (!last && (first || done - share <= share - before)) cut(t + 1, done);
            else if (!first) cut(end, before);
        }
        before = done;
        end = t + 1;
    }
    cut(b.n_tokens, total);
    if (longest * 4 * parts > total * 5) return {};
    return {ends.begin() + 1, ends.end()};
}

}  // namespace

Engine::Engine(const Engine& whole)
    : program_(whole.program_),
      kernels_(whole.kernels_),
      caches_(whole.caches_),
      memory_(whole.memory_),
      team_(1),
      slots_(program_.slots.size()),
      fence_(whole.fence_),
      scratch_(1, std::vector<float>((size_t)program_.scratch * program_.scratch_values)),
      states_(whole.states_),
      state_at_(whole.state_at_),
      zeros_(whole.zeros_),
      head_(whole.head_),
      samplers_(1, RowSampler(kernels_)) {}

bool Engine::in_lanes(const Batch& batch, const Rows& rows, const std::function<bool()>& stop) {
    const int lanes = team_.size(), least = program_.lane_tokens;
    if (lanes == 1 || !least || exchange_ || batch.received || batch.n_tokens < lanes * least ||
        !std::is_sorted(batch.logit_rows, batch.logit_rows + batch.n_logit_rows))
        return false;
    const std::vector<int> ends = cuts(batch, lanes);
    if (ends.size() < 2) return false;
    while (lanes_.size() < ends.size()) lanes_.emplace_back(new Engine(*this));
    team_.run(batch.n_tokens, [&](int thread) {
        for (size_t i = thread; i < ends.size(); i += team_.members()) {
            const Part part(batch, rows, program_, i ? ends[i - 1] : 0, ends[i]);
            lanes_[i]->rope = rope;
            lanes_[i]->forward(part.batch, part.rows, nullptr, i ? nullptr : stop);
        }
    });
    return true;
}

}  // namespace isobit
