// embedding: row tokens[t] of matrices[0] to out[0].

#include "../engine/engine.h"

namespace isobit {

static void embedding(const Op& op, Pass& p, int thread, int t, int i) {
    const Matrix& table = op.matrices[0];
    p.kernels.dequantise(table.type, table.data + p.batch.tokens[t] * table.row_bytes,
                         table.columns, p.at(op.out[0], thread, t, i));
}

static const OpKind kind("embedding", embedding);

}  // namespace isobit
