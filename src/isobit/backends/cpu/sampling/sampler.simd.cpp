// A row of logits turned into what is drawn from, docs/numerics.md section 10; the loops over a row are
// plain ones that the compiler turns into vectors of each SIMD level.

#include "../engine/simd_op.h"

#ifndef ISOBIT_LEVEL
#include "sampler.h"

#include <string.h>

#include <algorithm>
#include <bit>
#include <cfloat>
#include <cmath>
#include <numeric>

#include "scalar.h"
#endif

namespace isobit {

template <Level>
struct Largest {
    static float run(const float* z, int n, uint32_t* magnitude);
};

template <Level>
struct Weigh {
    static void run(const float* z, int n, float top, float temperature, uint32_t* p,
                    uint32_t* most, uint64_t* sums);
};

template <Level>
struct SumAbove {
    static uint64_t run(const uint32_t* p, int n, uint32_t least, uint32_t* equals);
};

#ifdef ISOBIT_LEVEL

// The largest value; *magnitude is the largest bit pattern without sign, which tells of a NaN.
template <>
float Largest<LEVEL>::run(const float* z, int n, uint32_t* magnitude) {
    int32_t high = INT32_MIN, odd = 0;
    for (int i = 0; i < n; ++i) {
        int32_t b = (int32_t)bits(z[i]), m = b & 0x7fffffff;
        int32_t key = b < 0 ? ~m : b;  // ordered as the numbers are
        high = key > high ? key : high;
        odd = m > odd ? m : odd;
    }
    *magnitude = (uint32_t)odd;
    return from_bits(high < 0 ? ~(uint32_t)high | 0x80000000u : (uint32_t)high);
}

FN void weigh_block(const float* z, int n, float top, float temperature, bool divide, uint32_t* p,
                    uint32_t* most, uint64_t* sum) {
    for (int i = 0; i < n; ++i) {
        float x = z[i] - top;
        p[i] = bits(exp_of_negative(divide ? x / temperature : x));
    }
    uint32_t high = 0;
    for (int i = 0; i < n; ++i) high = p[i] > high ? p[i] : high;
    uint64_t total = 0;
    if (high >= 0x2b800000u)  // 2^-40: below it every weight is 0
        for (int i = 0; i < n; ++i) total += weight(p[i]);
    *most = high;
    *sum = total;
}

// p: bit patterns of the n probabilities relative to the largest. most, sums: of each LOGIT_BLOCK.
template <>
void Weigh<LEVEL>::run(const float* z, int n, float top, float temperature, uint32_t* p,
                       uint32_t* most, uint64_t* sums) {
    for (int i = 0, b = 0; i < n; i += LOGIT_BLOCK, ++b) {
        const int m = n - i < LOGIT_BLOCK ? n - i : LOGIT_BLOCK;
        if (temperature == 1)
            weigh_block(z + i, m, top, 1, false, p + i, most + b, sums + b);
        else
            weigh_block(z + i, m, top, temperature, true, p + i, most + b, sums + b);
    }
}

// The sum of the weights of every p above `least`; *equals counts those that are `least`.
template <>
uint64_t SumAbove<LEVEL>::run(const uint32_t* p, int n, uint32_t least, uint32_t* equals) {
    uint64_t total = 0;
    uint32_t same = 0;
    for (int i = 0; i < n; ++i) {
        same += p[i] == least;
        total += weight(p[i] > least ? p[i] : 0);
    }
    *equals = same;
    return total;
}

#else

namespace {

typedef unsigned __int128 uint128;

uint64_t high_product(uint64_t a, uint64_t b) { return (uint64_t)((uint128)a * b >> 64); }

// Word 0 of Philox 4x64 with 10 rounds, key (seed, 0), counter (index, 0, 0, 0).
uint64_t random_bits(uint64_t seed, uint64_t index) {
    uint64_t c[4] = {index, 0, 0, 0}, k[2] = {seed, 0};
    for (int round = 0; round < 10; ++round) {
        const uint128 a = (uint128)0xD2E7470EE14C6C93u * c[0];
        const uint128 b = (uint128)0xCA5A826395121157u * c[2];
        const uint64_t next[4] = {(uint64_t)(b >> 64) ^ c[1] ^ k[0], (uint64_t)b,
                                  (uint64_t)(a >> 64) ^ c[3] ^ k[1], (uint64_t)a};
        memcpy(c, next, sizeof c);
        k[0] += 0x9E3779B97F4A7C15u;
        k[1] += 0xBB67AE8584CAA73Bu;
    }
    return c[0];
}

float log_total(uint64_t total) { return log((float)total * 0x1p-40f); }

constexpr uint32_t INFINITE = 0x7f800000, SIGN = 0x80000000;

// What is kept of likely texts lies above the first of these; a weight below the second is 0.
constexpr uint32_t LEVELS[] = {0x38800000, 0x2b800000};  // 2^-14, 2^-40

}  // namespace

int32_t RowSampler::choose(const float* raw, int n, const Sampling& s, const Edits& edits) {
    uint32_t magnitude;
    float top = run_of<Largest>(kernels_)(raw, n, &magnitude);
    if (magnitude >= INFINITE) return NOT_FINITE;
    const float* z = raw;
    if (edits.n || edits.allowed) {
        z = edited(raw, n, edits);
        top = run_of<Largest>(kernels_)(z, n, &magnitude);
        if (bits(top) == (INFINITE | SIGN)) return NONE_ALLOWED;
    }
    if (s.temperature == 0) return (int32_t)(std::find(z, z + n, top) - z);

    uint64_t all = weigh(z, n, top, s.temperature);
    Cut kept = {0, 0};
    if (s.top_k || s.top_p || s.min_p > 0) {
        kept = filter(all, s);
        all = keep(kept);
    }
    return draw(kept, high_product(random_bits(s.seed, s.index), all));
}

// A copy with the edits made; what is not allowed is minus infinity.
const float* RowSampler::edited(const float* z, int n, const Edits& edits) {
    z_.assign(z, z + n);
    for (int i = 0; i < edits.n; ++i) z_[edits.ids[i]] = edits.logits[i];
    for (int i = 0; edits.allowed && i < n; i += 32) {  // mostly all or nothing of a word
        const int end = std::min(32, n - i);
        uint32_t forbidden = ~edits.allowed[i / 32];
        if (forbidden == UINT32_MAX) std::fill_n(&z_[i], end, from_bits(INFINITE | SIGN));
        else
            for (; forbidden; forbidden &= forbidden - 1)
                if (const int k = std::countr_zero(forbidden); k < end)
                    z_[i + k] = from_bits(INFINITE | SIGN);
    }
    return z_.data();
}

// Makes p_, most_ and sums_; returns the sum of all weights.
uint64_t RowSampler::weigh(const float* z, int n, float top, float temperature) {
    const int blocks = (n + LOGIT_BLOCK - 1) / LOGIT_BLOCK;
    p_.resize(n);
    most_.resize(blocks);
    sums_.resize(blocks);
    equals_.resize(blocks);
    run_of<Weigh>(kernels_)(z, n, top, temperature, p_.data(), most_.data(), sums_.data());
    return std::accumulate(sums_.begin(), sums_.end(), (uint64_t)0);
}

// What top_k, top_p and min_p leave; whole: the sum of all weights.
RowSampler::Cut RowSampler::filter(uint64_t whole, const Sampling& s) {
    Cut kept = {0, 0};
    if (s.top_k) kept = cut((uint64_t)s.top_k, [](uint32_t) { return (uint64_t)1; });
    if (s.top_p) {
        const uint64_t target = high_product(s.top_p, s.top_k ? keep(kept) : whole);
        kept = cut(std::max<uint64_t>(target, 1), [](uint32_t p) { return weight(p); });
    }
    const uint32_t least = bits(s.min_p);
    return least > kept.least ? Cut{least, UINT64_MAX} : kept;
}

// The fewest of the largest p whose measures reach the target, or all: a search for the bits of the
// least of them, ten at a time.
template <class Measure>
RowSampler::Cut RowSampler::cut(uint64_t target, Measure measure) {
    uint64_t sums[1024], above = 0;
    int bin;
    auto reached = [&] {
        for (bin = 1023; bin > 0 && above + sums[bin] < target; --bin) above += sums[bin];
        return above + sums[bin] >= target;
    };
    for (uint32_t level : LEVELS) {
        memset(sums, 0, sizeof sums);
        above = 0;
        each_block(level, [&](int begin, int end, int) {
            for (int i = begin; i < end; ++i)
                if (p_[i] >= level) sums[p_[i] >> 20] += measure(p_[i]);
        });
        if (reached()) break;
        if (level == LEVELS[1]) return {0, 0};
    }
    uint32_t prefix = (uint32_t)bin;
    matches_.clear();
    each_block(prefix << 20, [&](int begin, int end, int) {
        for (int i = begin; i < end; ++i)
            if (p_[i] >> 20 == prefix) matches_.push_back(p_[i]);
    });
    for (int shift : {10, 0}) {
        memset(sums, 0, sizeof sums);
        for (uint32_t p : matches_)
            if (p >> shift >> 10 == prefix) sums[p >> shift & 1023] += measure(p);
        reached();
        prefix = prefix << 10 | (uint32_t)bin;
    }
    const uint64_t each = measure(prefix);
    return {prefix, (target - above + each - 1) / each};
}

// Makes sums_ those of what is kept; returns the sum of them.
uint64_t RowSampler::keep(Cut kept) {
    uint64_t left = kept.equals, total = 0;
    std::fill(sums_.begin(), sums_.end(), 0);
    each_block(kept.least, [&](int begin, int end, int b) {
        const uint64_t sum =
            run_of<SumAbove>(kernels_)(&p_[begin], end - begin, kept.least, &equals_[b]);
        const uint64_t equals = std::min<uint64_t>(left, equals_[b]);
        left -= equals;
        sums_[b] = sum + equals * weight(kept.least);
        total += sums_[b];
    });
    return total;
}

// The first id up to and with which the weights of what is kept sum to more than u.
int32_t RowSampler::draw(Cut kept, uint64_t u) const {
    int b = 0;
    for (; u >= sums_[b]; ++b) {
        u -= sums_[b];
        if (sums_[b]) kept.equals -= std::min<uint64_t>(kept.equals, equals_[b]);
    }
    int i = b * LOGIT_BLOCK - 1;
    for (uint64_t w = 0;; u -= w) {
        const uint32_t p = p_[++i];
        const bool keeps = p > kept.least || (p == kept.least && kept.equals && kept.equals--);
        w = keeps ? weight(p) : 0;
        if (u < w) return i;
    }
}

int32_t RowSampler::measure(const float* z, int n, const int32_t* ids, int n_ids, float* values,
                            int k, int32_t* top_ids, float* top_values) {
    uint32_t magnitude;
    const float most = run_of<Largest>(kernels_)(z, n, &magnitude);
    if (magnitude >= INFINITE) {
        std::fill(values, values + n_ids, NAN);
        std::fill(top_ids, top_ids + k, NOT_FINITE);
        std::fill(top_values, top_values + k, NAN);
        return NOT_FINITE;
    }
    if (n_ids || k) {
        const float all = log_total(weigh(z, n, most, 1));
        auto logprob = [&](int32_t id) { return std::max(z[id] - most, -FLT_MAX) - all; };
        std::transform(ids, ids + n_ids, values, logprob);
        if (k) top(z, n, k, top_ids);
        std::transform(top_ids, top_ids + k, top_values, logprob);
    }
    return (int32_t)(std::find(z, z + n, most) - z);
}

// The k largest logits in order. Candidates are collected until there are many, then thinned to k,
// the least of which is what later ones must exceed: of equals, the lower id came first.
void RowSampler::top(const float* z, int n, int k, int32_t* ids) const {
    std::vector<int32_t> best;
    auto before = [z](int32_t a, int32_t b) { return z[a] > z[b] || (z[a] == z[b] && a < b); };
    float least = 0;
    bool full = false;
    auto thin = [&] {
        std::nth_element(best.begin(), best.begin() + (k - 1), best.end(), before);
        best.resize(k);
        least = z[best[k - 1]];
        full = true;
    };
    for (int begin = 0; begin < n; begin += LOGIT_BLOCK) {
        const int end = std::min(n, begin + LOGIT_BLOCK);
        uint32_t magnitude;
        if (full && run_of<Largest>(kernels_)(z + begin, end - begin, &magnitude) <= least) continue;
        for (int i = begin; i < end; ++i)
            if (!full || z[i] > least) best.push_back(i);
        if ((int)best.size() >= k + LOGIT_BLOCK || (!full && (int)best.size() >= k)) thin();
    }
    thin();
    std::sort(best.begin(), best.end(), before);
    std::copy(best.begin(), best.end(), ids);
}

#endif

}  // namespace isobit
