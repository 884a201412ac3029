// The flat program of a pass: what Python lowers a model's graph to (lowering.py), once, at load. A phase
// is run by all threads of the team, which then meet; what its operations read and write are slots.
#pragma once

#include <stdint.h>

#include <string>
#include <vector>

#include "../kernels/kernels.h"
#include "matmul.h"

namespace isobit {

class Pass;

// Where an operation finds a vector of a value: vector i of row t. Slots below 0 are scratch memory of
// the thread, of one vector each.
struct Ref {
    int slot = 0;
    int width = 0;        // values in a row of the slot
    int offset = 0, step = 0;
    bool gather = false;  // row t is the token whose logits row t is
};

// What a slot holds: rows of vectors, as they are or with their quantised forms.
struct SlotShape {
    int width, vector;  // values of a row and of a vector
    bool integers;      // int32
    bool fixed;         // also in blocks of fixed point, for products
    bool query;         // also as 16-bit integers with a scale, for attention
};

// An operation on one vector. What inputs, weights and numbers mean: the file of its kind, in ops/.
struct Op {
    using Run = void (*)(const Op&, Pass&, int thread, int t, int i);
    Run run = nullptr;
    std::vector<Ref> in, out;
    std::vector<const float*> vectors;
    std::vector<Matrix> matrices;
    std::vector<float> numbers;
    std::vector<int> integers;
};

// Operations done one after another to each of `vectors` vectors of a row, `at_once` by one thread.
struct Chain {
    int vectors, at_once;
    std::vector<Op> ops;
};

// A stage that can be shown when its phase is done.
struct Show {
    std::string stage;
    int layer;
    Ref value;
    bool integers, logit_rows;
    std::vector<int> shape;  // of a row
};

constexpr int MOST_PRODUCTS = 16;  // of one phase

struct Phase {
    using Run = void (*)(const Phase&, Pass&, int thread);
    Run run = nullptr;
    int layer = -1;
    bool logit_rows = false;  // rows are those of the logits, not the tokens
    bool traced = false;      // only when one of its stages is wanted
    std::vector<Chain> chains;  // map
    std::vector<Op> after;      // map: what one thread does when the chains are done
    Op op;                      // the others
    std::vector<Show> shows;
};

// The paged cache of one append operation.
struct CacheShape {
    int heads, head_dim;
};

struct Program {
    std::vector<SlotShape> slots;
    std::vector<CacheShape> caches;
    std::vector<size_t> states;  // values that an operation keeps of a sequence
    std::vector<Phase> phases;
    int scratch = 0, scratch_values = 0;  // vectors of a thread, and values in each
    int vocab = 0, planes = 2, pages = 0, sequences = 0;
    int lane_tokens = 0;  // from so many for each thread on, sequences may run apart; 0: never
    int routers = 0, routed = 0;  // how many choose experts, and how many each chooses
    int hidden_made = -1, hidden_width = 0;  // the phase that makes the rows that logits are made of
    Ref hidden;
};

// Kinds of operations and phases by name, each registered by its own file.
template <class Run>
struct Registered {
    Registered(const char* name, Run run) : name(name), run(run), next(first) { first = this; }
    static Run find(const std::string& name) {
        for (const Registered* r = first; r; r = r->next)
            if (name == r->name) return r->run;
        return nullptr;
    }
    const char* name;
    Run run;
    const Registered* next;
    inline static const Registered* first = nullptr;
};
using OpKind = Registered<Op::Run>;
using PhaseKind = Registered<Phase::Run>;

}  // namespace isobit
