// Passes of many sequences on several threads: each thread runs all of the pass for some of the
// sequences, and waits for no other but at the end. What a batch is cut into changes no bit.
//
// A team that meets after each phase shares every read of the weights, but one thread that another
// program keeps from running holds all of them up some hundred times a pass. Where the weights lie in
// the processor's caches, lanes read them again for little.

#include <algorithm>

#include "engine.h"

namespace isobit {

namespace {

constexpr int STEP_POSITIONS = 500;  // a token costs about as much as attending to so many

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

// Where a batch is cut into so many parts that take about as long; empty if a sequence is too long.
std::vector<int> cuts(const Batch& b, int parts) {
    auto cost = [&](int t) { return STEP_POSITIONS + b.positions[t]; };
    long total = 0, done = 0, begun = 0;
    for (int t = 0; t < b.n_tokens; ++t) total += cost(t);
    std::vector<int> ends;
    for (int t = 0; t < b.n_tokens; ++t) {
        done += cost(t);
        const bool last = t + 1 == b.n_tokens;
        if (!last && (b.sequence[t + 1] == b.sequence[t] || done * parts < total * (long)(ends.size() + 1)))
            continue;
        if ((done - begun) * 4 * parts > total * 5) return {};
        ends.push_back(t + 1);
        begun = done;
    }
    return ends;
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
