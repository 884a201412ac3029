// gather: in[0] of every part of a split model, put together in out[0]. integers: vectors of a row,
// values of a part's vector for each part, then for each range of columns: its part, the first column
// of the part's vector and of the whole one, and how many.

#include <string.h>

#include <algorithm>

#include "../engine.h"

namespace isobit {

static void gather(const Phase& phase, Pass& pass, int) {
    Exchange& exchange = *pass.exchange;
    const Op& op = phase.op;
    const int vectors = op.integers[0], *of = &op.integers[1], *ranges = of + exchange.parts;
    const int n_ranges = ((int)op.integers.size() - 1 - exchange.parts) / 4;
    const int widest = *std::max_element(of, of + exchange.parts);
    const int mine = of[exchange.rank], at_once = exchange.room() / ((size_t)widest * vectors);
    for (int first = 0; first < pass.rows(phase); first += at_once) {
        const int n = std::min(at_once, pass.rows(phase) - first) * vectors;
        auto vector = [&](const Ref& r, int i) {
            return pass.at(r, 0, first + i / vectors, i % vectors);
        };
        pass.team.each(
            n,
            [&](int i) {
                memcpy(exchange.piece(exchange.rank) + (size_t)i * mine, vector(op.in[0], i),
                       mine * sizeof(float));
            },
            [&] { exchange.broken = exchange.broken || !exchange.meet(); });
        if (exchange.broken) return;  // every thread sees it alike: nobody has met since
        pass.team.each(
            n,
            [&](int i) {
                for (const int* r = ranges; r < ranges + 4 * n_ranges; r += 4)
                    memcpy(vector(op.out[0], i) + r[2],
                           exchange.piece(r[0]) + (size_t)i * of[r[0]] + r[1],
                           r[3] * sizeof(float));
            },
            [&] { exchange.next(); });
    }
}

static const PhaseKind kind("gather", gather);

}  // namespace isobit
