// Choosing tokens and log-probabilities, docs/numerics.md sections 10 and 11, a row of logits a time.
#pragma once

#include <stdint.h>

#include <vector>

#include "digest.h"
#include "../kernels/kernels.h"

namespace isobit {

struct Sampling {
    float temperature;
    int32_t top_k;   // 0: all
    uint64_t top_p;  // times 2^64; 0: all
    float min_p;
    uint64_t seed;
    uint64_t index;  // of the token in the output, from 1
};

// Adjusted logits, and the ids that a grammar allows (bit i % 32 of word i / 32; null: all).
struct Edits {
    const int32_t* ids;
    const float* logits;
    int n;
    const uint32_t* allowed;
};

// In place of a token.
constexpr int32_t NOT_FINITE = -1, NONE_ALLOWED = -2;

class RowSampler {
public:
    explicit RowSampler(const Kernels& kernels) : digest(kernels), kernels_(kernels) {}

    TreeDigest digest;  // of a row, and whatever else

    // A token, or NOT_FINITE, NONE_ALLOWED.
    int32_t choose(const float* z, int n, const Sampling& s, const Edits& edits);

    // The most likely id, the lowest among equals; log-probabilities of ids, and of the k largest logits
    // in order. NOT_FINITE, and the rest is NaN and -1, if a logit is not finite.
    int32_t measure(const float* z, int n, const int32_t* ids, int n_ids, float* values, int k,
                    int32_t* top_ids, float* top_values);

private:
    // What is kept: every p above `least`, and the first `equals` ids of those that are `least`.
    struct Cut {
        uint32_t least;
        uint64_t equals;
    };

    const float* edited(const float* z, int n, const Edits& edits);
    uint64_t weigh(const float* z, int n, float top, float temperature);
    Cut filter(uint64_t whole, const Sampling& s);
    template <class Measure>
    Cut cut(uint64_t target, Measure measure);
    uint64_t keep(Cut kept);
    int32_t draw(Cut kept, uint64_t u) const;
    void top(const float* z, int n, int k, int32_t* ids) const;

    // Calls f(begin, end, block) for each LOGIT_BLOCK of p_ with a value of `least` or more.
    template <class F>
    void each_block(uint32_t least, F&& f) const {
        const int n = (int)p_.size();
        for (int b = 0; b < (int)most_.size(); ++b)
            if (most_[b] >= least)
                f(b * LOGIT_BLOCK, b * LOGIT_BLOCK + LOGIT_BLOCK < n ? (b + 1) * LOGIT_BLOCK : n, b);
    }

    const Kernels& kernels_;
    std::vector<float> z_;
    std::vector<uint32_t> p_;       // a row's probabilities relative to the largest, as bit patterns
    std::vector<uint32_t> most_;    // the largest of each LOGIT_BLOCK of them
    std::vector<uint64_t> sums_;    // the sum of the weights that are kept of each
    std::vector<uint32_t> equals_;  // how many of each are a cut's least
    std::vector<uint32_t> matches_;
};

}  // namespace isobit
