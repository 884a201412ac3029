// Float weights: y = sum256(W_k * x_k), W converted exactly.
#pragma once

namespace isobit::ISOBIT_SIMD {

// A binary16, exactly.
FN float half_value(const uint8_t* p) {
    uint16_t x;
    memcpy(&x, p, 2);
    uint32_t sign = (uint32_t)(x & 0x8000) << 16, rest = x & 0x7fff;
    // As a binary32 the exponent is 112 too small; multiplying is exact and mends subnormals.
    float y = from_bits(rest << 13) * from_bits(0x77800000u);
    uint32_t special = rest >= 0x7c00 ? 0x7f800000u : 0;
    return from_bits(bits(y) | special | sign);
}

constexpr size_t PREFETCH_AHEAD = 8192;  // bytes, beyond the next tile

struct AsF32 {
    static constexpr int bytes = 4;
    FN float value(const uint8_t* p) {
        float x;
        memcpy(&x, p, 4);
        return x;
    }
};
struct AsBF16 {
    static constexpr int bytes = 2;
    FN float value(const uint8_t* p) {
        uint16_t x;
        memcpy(&x, p, 2);
        return from_bits((uint32_t)x << 16);
    }
};
struct AsF16 {
    static constexpr int bytes = 2;
    FN float value(const uint8_t* p) { return half_value(p); }
};

template <class Format>
FN float dot_float(const uint8_t* w, const float* x, int columns, bool prefetches) {
    Lanes256 lanes;
    int k = 0;
    for (; k + 256 <= columns; k += 256) {
        const uint8_t* block = w + (size_t)k * Format::bytes;
        if (prefetches)
            for (int i = 0; i < 256 * Format::bytes; i += 64)
                __builtin_prefetch(block + PREFETCH_AHEAD + i);
        for (int i = 0; i < 256; ++i) lanes.v[i] += Format::value(block + i * Format::bytes) * x[k + i];
    }
    for (int i = 0; k + i < columns; ++i)
        lanes.v[i] += Format::value(w + (size_t)(k + i) * Format::bytes) * x[k + i];
    return lanes.sum();
}

// A few rows stay in the first cache while tokens go by.
template <class Format>
static void matmul_float(const void*, const Product& m, int begin, int end) {
    for (int first = begin; first < end; first += FLOAT_ROWS) {
        const int last = first + FLOAT_ROWS < end ? first + FLOAT_ROWS : end;
        for (int t = 0; t < m.tokens; ++t) {
            const float* x = m.x + (size_t)(m.x_rows ? m.x_rows[t] : t) * m.columns;
            float* y = m.y + (m.y_rows ? m.y_rows[t] : t) * m.y_stride;
            for (int row = first; row < last; ++row)
                y[row] = dot_float<Format>(m.w + (size_t)row * m.row_bytes, x, m.columns, t == 0);
        }
    }
}

template <class Format>
static void dequantise_float(const uint8_t* row, int n, float* out) {
    for (int k = 0; k < n; ++k) out[k] = Format::value(row + (size_t)k * Format::bytes);
}

}  // namespace isobit::ISOBIT_SIMD
