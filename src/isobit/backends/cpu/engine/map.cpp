// map: chains of operations on the vectors of rows; a vector's operations are one thread's.

#include <algorithm>

#include "engine.h"

namespace isobit {

static void map(const Phase& phase, Pass& pass, int thread) {
    int per_row = 0;
    for (const Chain& c : phase.chains) per_row += (c.vectors + c.at_once - 1) / c.at_once;
    auto item = [&](int n) {
        const int t = n / per_row;
        int at = n % per_row;
        const Chain* chain = phase.chains.data();
        for (int steps; at >= (steps = (chain->vectors + chain->at_once - 1) / chain->at_once);
             ++chain)
            at -= steps;
        const int first = at * chain->at_once;
        for (int i = first; i < std::min(first + chain->at_once, chain->vectors); ++i)
            for (const Op& op : chain->ops) op.run(op, pass, thread, t, i);
    };
    // Some at a time: many threads would wait for one another at the counter.
    const int items = pass.rows(phase) * per_row, step = rows_at_once(items, pass.team.members(), 1);
    auto some = [&](int i) {
        for (int n = i * step; n < std::min((i + 1) * step, items); ++n) item(n);
    };
    pass.team.parallel_for((items + step - 1) / step, some, [&] {
        for (const Op& op : phase.after) op.run(op, pass, thread, 0, 0);
    });
}

static const PhaseKind kind("map", map);

}  // namespace isobit
