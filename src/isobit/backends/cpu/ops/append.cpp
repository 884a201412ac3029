// append: keys in[0] and values in[1] quantised, to their places in the pages; integers: the cache.

#include "../engine/engine.h"

namespace isobit {

static void append(const Op& op, Pass& p, int thread, int t, int i) {
    const Cache& cache = p.cache(op.integers[0]);
    const int D = cache.layout.head_dim, position = p.batch.positions[t];
    int16_t k[MAX_HEAD_DIM], v[MAX_HEAD_DIM];
    float dk, dv;
    p.kernels.quantise_head(p.at(op.in[0], thread, t, i), D, k, &dk);
    p.kernels.quantise_head(p.at(op.in[1], thread, t, i), D, v, &dv);
    const int32_t* pages = p.batch.pages + (size_t)p.batch.sequence[t] * p.batch.pages_per_sequence;
    run_of<Store>(p.kernels)(cache.layout, p.page(cache, pages[position / KV_PAGE], i),
                             position % KV_PAGE, k, dk, v, dv);
}

static const OpKind kind("append", append);

}  // namespace isobit
