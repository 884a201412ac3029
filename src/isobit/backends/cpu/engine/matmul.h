// Matrix products and experts run by a team: work is split by rows of the weights alone, so that no
// number of threads can change a bit.
#pragma once

#include <stdint.h>

#include <vector>

#include "../kernels/kernels.h"
#include "threads.h"

namespace isobit {

// A matrix in a GGUF format, or a stack of them, one behind the other.
struct Matrix {
    const uint8_t* data = nullptr;
    int type = 0;  // ggml's number
    int rows = 0;
    int columns = 0;
    size_t row_bytes = 0;
};

// Rows of floats and the same in fixed point: what a product reads.
struct Input {
    std::vector<float> values;
    std::vector<Activations> fixed;
    std::vector<int16_t> words;  // where the level multiplies with whole integers, too
    int columns = 0;

    float* row(int i) { return values.data() + (size_t)i * columns; }
    void quantise(const Kernels& kernels, int i, int planes);
};

struct Job {
    Product product;
    Matmul f;
    int rows;
};

Job job(const Kernels& kernels, int planes, const Matrix& w, const Input& x, int tokens, float* y,
        size_t y_stride);

// Rows, or other items, that one thread takes at a time, a multiple of `least`.
int rows_at_once(int total_rows, int threads, int least = ROW_STEP);

// All rows of all jobs; called by every thread of the team.
void multiply(Team& team, const Job* jobs, int n);

}  // namespace isobit
