#include "matmul.h"

#include <algorithm>

namespace isobit {

void Input::quantise(const Kernels& kernels, int i, int planes) {
    const size_t first = (size_t)i * blocks_of(columns);
    kernels.quantise(row(i), columns, planes, fixed.data() + first,
                     kernels.words ? words.data() + first * SUPERBLOCK : nullptr);
}

Job job(const Kernels& kernels, int planes, const Matrix& w, const Input& x, int tokens, float* y,
        size_t y_stride) {
    Product p = {w.data,  w.row_bytes, w.columns, x.fixed.data(), x.values.data(),
                 nullptr, nullptr,     y,         y_stride,       tokens,         nullptr};
    return {p, kernels.matmul(w.type, planes), w.rows};
}

int rows_at_once(int total_rows, int threads, int least) {
    return std::max(total_rows / (threads * 16) / least, 1) * least;
}

void multiply(Team& team, const Job* jobs, int n) {
    int total = 0, of_a_block = 0;
    bool floats = true;  // which need no tiles of rows: a router has too few for many threads
    for (int j = 0; j < n; ++j) total += jobs[j].rows, floats &= !jobs[j].f.format;
    // Rows and a block of tokens at a time: both stay in a core's cache, where all tokens of a long
    // prompt would not.
    const int tokens = jobs->product.tokens, blocks = (tokens + TOKEN_BLOCK - 1) / TOKEN_BLOCK;
    const int step = rows_at_once(total * blocks, team.members(), floats ? FLOAT_ROWS : ROW_STEP);
    for (int j = 0; j < n; ++j) of_a_block += (jobs[j].rows + step - 1) / step;
    const int items = of_a_block * blocks;
    // Makes i an index of the job's items.
    auto job_of = [&](int& i) {
        const Job* job = jobs;
        for (int count; i >= (count = (job->rows + step - 1) / step); ++job) i -= count;
        return job;
    };
    team.parallel_for_with_prefetch(items, [&](int i, int next) {
        const int first = i / of_a_block * TOKEN_BLOCK;
        const Job* job = job_of(i %= of_a_block);
        Product p = job->product;
        p.tokens = std::min(tokens - first, TOKEN_BLOCK);
        if (job->f.format)
            p.q += (size_t)first * blocks_of(p.columns);
        else
            p.x += (size_t)first * p.columns;
        p.y += (size_t)first * p.y_stride;
        if (next < items) {
            const Job* then = job_of(next %= of_a_block);
            p.next = then->product.w + (size_t)next * step * then->product.row_bytes;
        }
        job->f(p, i * step, std::min((i + 1) * step, job->rows));
    });
}

}  // namespace isobit
