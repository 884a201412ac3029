// products: matrices that do not wait for one another, rows of all of them shared out together. Matrix
// j multiplies in[j] to out[j].

#include "../engine/engine.h"

namespace isobit {

static void products(const Phase& phase, Pass& pass, int) {
    const Op& op = phase.op;
    Job jobs[MOST_PRODUCTS];
    for (size_t j = 0; j < op.matrices.size(); ++j)
        jobs[j] = job(pass.kernels, pass.planes, op.matrices[j], pass.slot(op.in[j]).input,
                      pass.rows(phase), pass.at(op.out[j], 0, 0, 0), op.out[j].width);
    multiply(pass.team, jobs, (int)op.matrices.size());
}

static const PhaseKind kind("products", products);

}  // namespace isobit
