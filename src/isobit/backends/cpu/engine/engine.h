// A program ready to run: its slots, its KV caches, and one pass over a batch.
#pragma once

#include <functional>
#include <memory>

#include "attention.h"
#include "exchange.h"
#include "moe.h"
#include "program.h"
#include "../sampling/sampler.h"
#include "threads.h"

namespace isobit {

struct RopeRows {
    const float *cos, *sin;  // [rows, half], by position
    int rows, half;
};

// See isobit.backends.base.Batch.
struct Batch {
    int n_tokens, pages_per_sequence, n_logit_rows;
    const int32_t *tokens, *positions, *sequence, *pages, *logit_rows;
    const int32_t* states;  // of each sequence; null: sequence s has state s
    const float* received;  // rows of the stage before this one, or null
    uint8_t* routes;        // the experts of each token, [tokens][routers][k], or null
    int route_bytes;        // of each: 1 or 2
};

// What a pass gives of its logit rows: see isobit.backends.base.Wanted.
struct Rows {
    float* logits;          // [n, vocab], or null
    const int32_t* places;  // of each row among these, or -1; null: all rows, in order
    int32_t* argmax;     // NOT_FINITE for a row that is not
    const int32_t* ids;     // n_ids of each row, whose log-probabilities are wanted
    int n_ids;
    float* values;
    int k;                  // so many of the most likely are wanted
    int32_t* top_ids;
    float* top;
    uint8_t* digests;       // of each row's logits, or null
    float* hidden;          // what logits are made of, or null
    bool only_hidden;       // whether nothing else is wanted
};

// Receives stages of the pass; layer is -1 outside the layers.
class Tap {
public:
    virtual ~Tap() = default;
    virtual bool wants(const std::string& stage) const = 0;
    virtual void take(const Show& show, const void* data, int rows) = 0;
};

// Memory that takes none until it is touched.
class LazyMemory {
public:
    explicit LazyMemory(size_t bytes);
    ~LazyMemory();
    LazyMemory(const LazyMemory&) = delete;
    LazyMemory& operator=(const LazyMemory&) = delete;
    uint8_t* data() const { return data_; }

private:
    uint8_t* data_;
    size_t bytes_;
};

struct Cache {
    PageLayout layout;
    int heads;
    size_t at;  // of its first page in the caches' memory
};

// Rows of floats (or int32) with their quantised forms, as long as the longest pass so far.
struct Slot {
    Input input;
    std::vector<int32_t> integers;
    std::vector<int16_t> query;
    std::vector<float> query_scale;
};

class Engine {
public:
    // exchange: of one part of a split model, else null.
    Engine(Program program, const Kernels& kernels, int threads, std::unique_ptr<Exchange> exchange);

    // tap may be null; if it is not, all logits are wanted. stop, unless it is empty, is asked before
    // each layer; once it says true the pass ends, without results. False: another part has ended,
    // and what the pass gave is void.
    bool forward(const Batch& batch, const Rows& rows, Tap* tap, const std::function<bool()>& stop);

    std::vector<RopeRows> rope;  // of each table the positions so far

    // A sequence's recurrent state to another's place.
    void copy_state(int from, int to);

    const Program& program() const { return program_; }

    // For tests: known bytes behind what passes may write of the slots; whether they are as they were.
    void fence() { fence_ = 64; }
    bool intact();
    int lanes() const { return (int)lanes_.size(); }  // that were used

    // For benchmarks: how long each phase took since this was first asked, and how long threads stood
    // at barriers in it, all of them together.
    struct Spent {
        TeamSize::Duration took{0}, stood{0};
    };
    std::vector<Spent> spent();

private:
    friend class Pass;

    // lanes.cpp: one that computes in the same caches and states, on one thread; a pass by several of
    // these, side by side. False: the batch is not one for that, and nothing ran.
    explicit Engine(const Engine& whole);
    bool in_lanes(const Batch& batch, const Rows& rows, const std::function<bool()>& stop);

    template <class F>
    void each_slot(size_t rows, F&& f);
    void prepare(const Batch& batch);
    void measure(const Rows& rows, int row, const float* logits, int thread);

    Program program_;
    const Kernels& kernels_;
    std::vector<Cache> caches_;
    std::shared_ptr<LazyMemory> memory_;
    Team team_;
    std::vector<Slot> slots_;
    size_t fence_ = 0;  // elements
    std::vector<Spent> spent_;  // of each phase, or empty
    std::vector<std::vector<float>> scratch_;  // of each thread
    SortedPairs experts_, dense_;
    std::shared_ptr<LazyMemory> states_;
    std::vector<size_t> state_at_;  // of each operation, the first sequence's
    std::vector<int> starts_, first_;  // of each sequence its first token, then the end; of each token
    std::vector<float> zeros_;
    std::unique_ptr<Exchange> exchange_;
    size_t head_;                       // phases from here on are of logit rows
    std::vector<RowSampler> samplers_;  // of each thread
    std::vector<float> logits_;         // of a block of rows that are not handed out
    std::vector<std::unique_ptr<Engine>> lanes_;  // made when they are first used
};

// One pass: every thread of the team runs all of it, meeting the others after each phase. Each thread
// has one, all of them alike.
class Pass {
public:
    Pass(Engine& e, const Batch& b)
        : kernels(e.kernels_), team(e.team_), batch(b), planes(e.program_.planes),
          exchange(e.exchange_.get()), e_(e) {}

    float* at(const Ref& r, int thread, int t, int i) const {
        if (r.slot < 0)
            return &e_.scratch_[thread][(size_t)(-1 - r.slot) * e_.program_.scratch_values];
        const size_t row = r.gather ? batch.logit_rows[first_row_ + t] : t;
        float* data = r.slot == 0 ? logits_ : e_.slots_[r.slot].input.values.data();
        return data + row * r.width + r.offset + (size_t)i * r.step;
    }
    int32_t* integers(const Ref& r, int t) const {
        return &e_.slots_[r.slot].integers[(size_t)t * r.width + r.offset];
    }
    Slot& slot(const Ref& r) const { return e_.slots_[r.slot]; }
    int vector(const Ref& r) const { return e_.program_.slots[r.slot].vector; }
    const Cache& cache(int i) const { return e_.caches_[i]; }
    uint8_t* page(const Cache& c, int page, int head) const {
        return e_.memory_->data() + c.at + ((size_t)page * c.heads + head) * c.layout.bytes;
    }
    // What an operation keeps of token t's sequence.
    float* state(int i, int t) const {
        const int row = batch.sequence[t];
        const size_t sequence = batch.states ? batch.states[row] : row;
        return (float*)e_.states_->data() + e_.state_at_[i] + sequence * e_.program_.states[i];
    }
    // The first token of the batch that belongs to token t's sequence; all such tokens, then the end.
    int first(int t) const { return e_.first_[t]; }
    const std::vector<int>& starts() const { return e_.starts_; }
    const float* zeros() const { return e_.zeros_.data(); }  // as many as a state has
    // Which tokens go to which expert: the choice of the last top_k, or one expert for all.
    SortedPairs& sorted_pairs(bool dense) const { return dense ? e_.dense_ : e_.experts_; }
    // Hand out the experts that a router has chosen for a token.
    void route(int router, int t, const int32_t* ids, int k) const {
        const size_t at = ((size_t)t * e_.program_.routers + router) * k;
        for (int i = 0; batch.routes && i < k; ++i)
            if (batch.route_bytes == 1) batch.routes[at + i] = (uint8_t)ids[i];
            else ((int16_t*)batch.routes)[at + i] = (int16_t)ids[i];
    }
    int rows(const Phase& phase) const {
        return phase.logit_rows ? n_rows_ : batch.n_tokens;
    }
    const RopeRows& rope(int table) const { return e_.rope[table]; }

    // The logit rows that are computed now, and where their logits go.
    void block(int first, int n, float* logits) {
        first_row_ = first;
        n_rows_ = n;
        logits_ = logits;
    }

    const Kernels& kernels;
    Team& team;
    const Batch& batch;
    const int planes;
    Exchange* const exchange;  // of one part of a split model

private:
    Engine& e_;
    int first_row_ = 0, n_rows_ = 0;
    float* logits_ = nullptr;
};

}  // namespace isobit
