#include "engine.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <new>

namespace isobit {

LazyMemory::LazyMemory(size_t bytes) : bytes_(std::max(bytes, (size_t)1)) {
    int flags = MAP_PRIVATE | MAP_ANONYMOUS;
#ifdef MAP_NORESERVE
    flags |= MAP_NORESERVE;
#endif
    void* p = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    data_ = (uint8_t*)p;
}

LazyMemory::~LazyMemory() { munmap(data_, bytes_); }

namespace {

size_t cache_bytes(const Program& p) {
    size_t total = 0;
    for (const CacheShape& c : p.caches)
        total += (size_t)p.pages * c.heads * page_layout(c.head_dim).bytes;
    return total;
}

constexpr int ROWS_AT_ONCE = 64;  // of logits that are not handed out

size_t state_values(const Program& p) {
    size_t total = 0;
    for (size_t n : p.states) total += n * p.sequences;
    return total;
}

}  // namespace

Engine::Engine(Program program, const Kernels& kernels, int threads,
               std::unique_ptr<Exchange> exchange)
    : program_(std::move(program)),
      kernels_(kernels),
      memory_(std::make_shared<LazyMemory>(cache_bytes(program_))),
      team_(threads),
      slots_(program_.slots.size()),
      scratch_(team_.size(),
               std::vector<float>((size_t)program_.scratch * program_.scratch_values)),
      states_(std::make_shared<LazyMemory>(state_values(program_) * sizeof(float))),
      exchange_(std::move(exchange)),
      head_(program_.phases.size()),
      samplers_(team_.size(), RowSampler(kernels)) {
    while (head_ && program_.phases[head_ - 1].logit_rows) --head_;
    size_t at = 0;
    for (const CacheShape& c : program_.caches) {
        caches_.push_back({page_layout(c.head_dim), c.heads, at});
        at += (size_t)program_.pages * c.heads * caches_.back().layout.bytes;
    }
    at = 0;
    for (size_t n : program_.states) {
        state_at_.push_back(at);
        at += n * program_.sequences;
        zeros_.resize(std::max(zeros_.size(), n));
    }
}

void Engine::copy_state(int from, int to) {
    for (size_t i = 0; i < program_.states.size(); ++i) {
        const size_t n = program_.states[i];
        float* states = (float*)states_->data() + state_at_[i];
        std::copy_n(states + from * n, n, states + to * n);
    }
}

// Calls f with each vector of each slot but the first, and how long it is for so many rows.
template <class F>
void Engine::each_slot(size_t rows, F&& f) {
    for (size_t s = 1; s < slots_.size(); ++s) {  // slot 0: the logits, which are the caller's
        const SlotShape& shape = program_.slots[s];
        const size_t vectors = rows * (shape.width / shape.vector);
        Slot& slot = slots_[s];
        slot.input.columns = shape.vector;
        if (shape.integers) f(slot.integers, rows * shape.width);
        else f(slot.input.values, rows * shape.width);
        if (shape.fixed) {
            const size_t blocks = vectors * blocks_of(shape.vector);
            f(slot.input.fixed, blocks);
            if (kernels_.words) f(slot.input.words, blocks * SUPERBLOCK);
        }
        if (shape.query) {
            f(slot.query, vectors * page_layout(shape.vector).padded);
            f(slot.query_scale, vectors);
        }
    }
}

bool Engine::intact() {
    bool all = true;
    each_slot(0, [&](auto& v, size_t) {
        const auto* end = (const uint8_t*)(v.data() + v.size());
        all &= std::all_of(end - std::min(fence_, v.size()) * sizeof v[0], end,
                           [](uint8_t x) { return x == 0xA5; });
    });
    for (const auto& lane : lanes_) all &= lane->intact();
    return all;
}

std::vector<Engine::Spent> Engine::spent() {
    spent_.resize(program_.phases.size());
    team_.watch();
    return spent_;
}

void Engine::prepare(const Batch& batch) {
    each_slot(std::max(batch.n_tokens, batch.n_logit_rows), [&](auto& v, size_t n) {
        if (v.size() >= n + fence_) return;
        v.resize(n + fence_);
        memset((void*)(v.data() + n), 0xA5, fence_ * sizeof v[0]);
    });
    dense_.one_for_all(batch.n_tokens);
    starts_.clear();
    first_.resize(batch.n_tokens);
    for (int t = 0; t < batch.n_tokens; ++t) {
        if (t == 0 || batch.sequence[t] != batch.sequence[t - 1]) starts_.push_back(t);
        first_[t] = starts_.back();
    }
    starts_.push_back(batch.n_tokens);
}

// What is wanted of a row, of its logits.
void Engine::measure(const Rows& rows, int row, const float* logits, int thread) {
    const size_t i = row;
    rows.argmax[i] = samplers_[thread].measure(
        logits, program_.vocab, rows.ids + i * rows.n_ids, rows.n_ids, rows.values + i * rows.n_ids,
        rows.k, rows.top_ids + i * rows.k, rows.top + i * rows.k);
    if (rows.digests)
        samplers_[thread].digest((const uint8_t*)logits, sizeof(float) * program_.vocab,
                                 rows.digests + i * DIGEST_BYTES);
    if (rows.places && rows.places[i] >= 0)
        std::copy(logits, logits + program_.vocab,
                  rows.logits + (size_t)rows.places[i] * program_.vocab);
}

bool Engine::forward(const Batch& batch, const Rows& rows, Tap* tap,
                     const std::function<bool()>& stop) {
    if (!tap && in_lanes(batch, rows, stop)) return true;
    prepare(batch);
    const size_t end = rows.only_hidden ? program_.hidden_made + 1 : program_.phases.size();
    const size_t width = program_.hidden_width;
    const bool direct = rows.logits && !rows.places;  // else some rows at a time, and kept here
    const int R = batch.n_logit_rows, at_once = std::min(R, direct ? R : ROWS_AT_ONCE);
    if (!direct && !rows.only_hidden && logits_.size() < (size_t)at_once * program_.vocab)
        logits_.resize((size_t)at_once * program_.vocab);
    float* logits = direct ? rows.logits : logits_.data();
    bool stopped = false;
    auto wanted = [&](const Show& s) { return tap && tap->wants(s.stage); };
    auto show = [&](const Phase& phase, const Pass& pass) {
        for (const Show& s : phase.shows)
            if (wanted(s)) {
                const void* data = s.integers ? (const void*)pass.integers(s.value, 0)
                                              : (const void*)pass.at(s.value, 0, 0, 0);
                tap->take(s, data, s.logit_rows ? R : batch.n_tokens);
            }
    };
    auto run = [&](const Phase& phase, Pass& pass, int thread) {
        if (phase.traced && std::none_of(phase.shows.begin(), phase.shows.end(), wanted)) return;
        if (spent_.empty() || thread != 0) {
            phase.run(phase, pass, thread);
        } else {
            const auto start = std::chrono::steady_clock::now();
            const TeamSize::Duration stood = team_.stood();
            phase.run(phase, pass, thread);
            Spent& spent = spent_[&phase - program_.phases.data()];
            spent.took += std::chrono::steady_clock::now() - start;
            spent.stood += team_.stood() - stood;
        }
        if (std::any_of(phase.shows.begin(), phase.shows.end(), wanted)) {
            if (thread == 0) show(phase, pass);
            team_.barrier();
        }
    };
    team_.run(batch.n_tokens, [&](int thread) {
        Pass pass(*this, batch);
        int layer = -1;
        for (size_t i = 0; i < head_; ++i) {
            const Phase& phase = program_.phases[i];
            if (stop && phase.layer != layer) {
                layer = phase.layer;
                if (thread == 0) stopped = stop();
                team_.barrier();
                if (stopped) return;
            }
            run(phase, pass, thread);
        }
        for (int first = 0; first < R || (tap && first == 0); first += std::max(at_once, 1)) {
            const int n = std::min(at_once, R - first);
            pass.block(first, n, logits);
            for (size_t i = head_; i < end; ++i) {
                run(program_.phases[i], pass, thread);
                if (rows.hidden && (int)i == program_.hidden_made && thread == 0)
                    for (int r = 0; r < n; ++r)
                        std::copy_n(pass.at(program_.hidden, thread, r, 0), width,
                                    rows.hidden + (size_t)(first + r) * width);
            }
            if (rows.only_hidden) {
                team_.barrier();  // before the next rows are made in the same place
                continue;
            }
            if (n == R && n <= 1) {  // no other row to wait for
                if (n && thread == 0) measure(rows, 0, logits, thread);
                continue;
            }
            team_.parallel_for(n, [&](int i) {
                measure(rows, first + i, logits + (size_t)i * program_.vocab, thread);
            });
        }
    });
    return !exchange_ || !exchange_->broken;
}

}  // namespace isobit
