// A row of a quantised table as floats, rounded as isobit.gguf.formats.dequantize rounds.
#pragma once

namespace isobit::ISOBIT_SIMD {

// Every lane unpacks the same row; the first is used.
template <class Format>
void dequantise_quantised(const uint8_t* row, int n, float* out) {
    constexpr int block = Format::block, group = Format::group;
    for (; n > 0; n -= block, row += Format::bytes, out += block) {
        const uint8_t* rows[LANES];
        for (int r = 0; r < LANES; ++r) rows[r] = row;
        WeightTile w;
        Format::unpack(rows, 1, w);
        for (int k = 0; k < block; ++k) {
            const int g = k / group;
            float scale = w.d[0][0];
            if (block == SUPERBLOCK) scale *= (int16_t)w.scale[g][0];
            uint8_t byte = (uint8_t)(w.codes[k / 4][0] >> k % 4 * 8);
            int code = (Format::largest > 127 && ZERO8 == 0 ? (int8_t)byte : byte) - Format::zero;
            out[k] = scale * (float)code;
            if (Format::mins) {
                int min = block == SUPERBLOCK ? w.mins[g / 2][0] >> g % 2 * 16 & 0xffff : 1;
                out[k] = out[k] - w.dmin[0][0] * (float)min;
            }
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
        case 2: return dequantise_quantised<Q4_0>(row, n, out);
        case 3: return dequantise_quantised<Q4_1>(row, n, out);
        case 6: return dequantise_quantised<Q5_0>(row, n, out);
        case 7: return dequantise_quantised<Q5_1>(row, n, out);
        case 8: return dequantise_quantised<Q8_0>(row, n, out);
        case 10: return dequantise_quantised<Q2_K>(row, n, out);
        case 11: return dequantise_quantised<Q3_K>(row, n, out);
        case 12: return dequantise_quantised<Q4_K>(row, n, out);
        case 13: return dequantise_quantised<Q5_K>(row, n, out);
        case 14: return dequantise_quantised<Q6_K>(row, n, out);
    }
}

}  // namespace isobit::ISOBIT_SIMD
