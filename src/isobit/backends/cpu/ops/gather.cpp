// gather: in[0] of every part of a split model, put together in out[0]. integers: vectors of a row,
// values of a part's vector for each part, then for each range of columns: its part, the first column
// of the part's vector and of the whole one, and how many.
//
// gather_experts: each vector of in[0] from the part that has its expert, in[1]. integers: vectors of a
// row, values of one, then the end of each part's experts.

#include <string.h>

#include <algorithm>

#include "../engine/engine.h"

namespace isobit {

// Gives n vectors of a part, of `mine` values each, at a time; take(first, i): vector i of those from
// row `first` on is there from every part.
template <class F>
static void exchanged(const Phase& phase, Pass& pass, int vectors, int mine, int widest, F&& take) {
    Exchange& exchange = *pass.exchange;
    const Op& op = phase.op;
    const int at_once = exchange.room() / ((size_t)widest * vectors);
    for (int first = 0; first < pass.rows(phase); first += at_once) {
        const int n = std::min(at_once, pass.rows(phase) - first) * vectors;
        pass.team.parallel_for(
            n,
            [&](int i) {
                memcpy(exchange.piece(exchange.rank) + (size_t)i * mine,
                       pass.at(op.in[0], 0, first + i / vectors, i % vectors),
                       mine * sizeof(float));
            },
            [&] { exchange.broken = exchange.broken || !exchange.meet(); });
        if (exchange.broken) return;  // every thread sees it alike: nobody has met since
        pass.team.parallel_for(n, [&](int i) { take(first, i); }, [&] { exchange.next(); });
    }
}

static void gather(const Phase& phase, Pass& pass, int) {
    Exchange& exchange = *pass.exchange;
    const Op& op = phase.op;
    const int vectors = op.integers[0], *of = &op.integers[1], *ranges = of + exchange.parts;
    const int n_ranges = ((int)op.integers.size() - 1 - exchange.parts) / 4;
    const int widest = *std::max_element(of, of + exchange.parts), mine = of[exchange.rank];
    exchanged(phase, pass, vectors, mine, widest, [&](int first, int i) {
        float* whole = pass.at(op.out[0], 0, first + i / vectors, i % vectors);
        for (const int* r = ranges; r < ranges + 4 * n_ranges; r += 4)
            memcpy(whole + r[2], exchange.piece(r[0]) + (size_t)i * of[r[0]] + r[1],
                   r[3] * sizeof(float));
    });
}

static void gather_experts(const Phase& phase, Pass& pass, int) {
    Exchange& exchange = *pass.exchange;
    const Op& op = phase.op;
    const int vectors = op.integers[0], width = op.integers[1], *ends = &op.integers[2];
    exchanged(phase, pass, vectors, width, width, [&](int first, int i) {
        const int row = first + i / vectors, expert = pass.integers(op.in[1], row)[i % vectors];
        const int part = (int)(std::upper_bound(ends, ends + exchange.parts, expert) - ends);
        memcpy(pass.at(op.out[0], 0, row, i % vectors),
               exchange.piece(part) + (size_t)i * width, width * sizeof(float));
    });
}

static const PhaseKind kind_experts("gather_experts", gather_experts);
static const PhaseKind kind("gather", gather);

}  // namespace isobit
