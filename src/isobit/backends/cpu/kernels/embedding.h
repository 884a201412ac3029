// A row of a quantised table as floats, rounded as isobit.gguf.formats.dequantize rounds.
#pragma once

namespace isobit::ISOBIT_SIMD {

FN int code_at(const U* codes, int k, bool is_signed) {
    const uint8_t byte = (uint8_t)(codes[k / 4][0] >> k % 4 * 8);
    return is_signed ? (int8_t)byte : byte;
}

// Every lane unpacks the same row; the first is used.
template <class Format>
void dequantise_quantised(const uint8_t* row, int n, float* out) {
    constexpr bool is_signed = Format::largest > 127 && WIDE_ZERO == 0;
    for (; n > 0; n -= Format::block, row += Format::bytes, out += Format::block) {
        const uint8_t* rows[LANES];
        for (int r = 0; r < LANES; ++r) rows[r] = row;
        U codes[Format::block / 4];
        float d, dmin, scale[16], min[16] = {};
        if constexpr (Format::block == SUPERBLOCK) {
            Scales w;
            Format::scales(rows, w);
            Format::codes(rows, [&](int j, U v) __attribute__((always_inline)) { codes[j] = v; });
            d = w.d[0], dmin = Format::mins ? w.dmin[0] : 0;
            for (int g = 0; g < SUPERBLOCK / Format::group; ++g) {
                scale[g] = d * code_at(w.scales, g, Format::signed_scales);
                if (Format::mins) min[g] = dmin * code_at(w.mins, g, false);
            }
        } else {
            Block<Format> w;
            Format::unpack(InRows{rows}, w);
            memcpy(codes, w.codes, sizeof codes);
            scale[0] = w.d[0];
            if (Format::mins) min[0] = w.dmin[0];
        }
        for (int k = 0; k < Format::block; ++k) {
            out[k] = scale[k / Format::group] * (float)(code_at(codes, k, is_signed) - Format::zero);
            if (Format::mins) out[k] = out[k] - min[k / Format::group];
        }
    }
}

template <class Format>
void dequantise_float(const uint8_t* row, int n, float* out) {
    for (int k = 0; k < n; ++k) out[k] = Format::value(row + (size_t)k * Format::bytes);
}

static void dequantise(int ggml_type, const uint8_t* row, int n, float* out) {
    switch (ggml_type) {
        case 0: return dequantise_float<AsF32>(row, n, out);
        case 1: return dequantise_float<AsF16>(row, n, out);
        case 30: return dequantise_float<AsBF16>(row, n, out);
#define ISOBIT_CASE(Format) \
    case Format::id: return dequantise_quantised<Format>(row, n, out);
        ISOBIT_QUANTISED(ISOBIT_CASE)
#undef ISOBIT_CASE
    }
}

}  // namespace isobit::ISOBIT_SIMD
