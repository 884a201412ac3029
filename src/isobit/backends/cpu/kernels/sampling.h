// A row of logits turned into what is drawn from, docs/numerics.md section 10: plain loops that the
// compiler turns into vectors of this level.
#pragma once

namespace isobit::ISOBIT_SIMD {

// The largest value; *magnitude is the largest bit pattern without sign, which tells of a NaN.
static float largest(const float* z, int n, uint32_t* magnitude) {
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
static void weigh(const float* z, int n, float top, float temperature, uint32_t* p, uint32_t* most,
                  uint64_t* sums) {
    for (int i = 0, b = 0; i < n; i += LOGIT_BLOCK, ++b) {
        const int m = n - i < LOGIT_BLOCK ? n - i : LOGIT_BLOCK;
        if (temperature == 1)
            weigh_block(z + i, m, top, 1, false, p + i, most + b, sums + b);
        else
            weigh_block(z + i, m, top, temperature, true, p + i, most + b, sums + b);
    }
}

// The sum of the weights of every p above `least`; *equals counts those that are `least`.
static uint64_t sum_above(const uint32_t* p, int n, uint32_t least, uint32_t* equals) {
    uint64_t total = 0;
    uint32_t same = 0;
    for (int i = 0; i < n; ++i) {
        same += p[i] == least;
        total += weight(p[i] > least ? p[i] : 0);
    }
    *equals = same;
    return total;
}

}  // namespace isobit::ISOBIT_SIMD
