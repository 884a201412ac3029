// A row of a table as floats, rounded as isobit.gguf.formats.dequantize rounds.
#pragma once

namespace isobit::ISOBIT_SIMD {

FN int byte_at(const U* bytes, int k) { return (int)(bytes[k / 4][0] >> k % 4 * 8 & 255); }

// Every lane unpacks the same row; the first is used.
static void dequantise_quantised(const Quantised& f, const uint8_t* row, int n, float* out) {
    const int size = SUPERBLOCK / f.info.block * f.info.bytes;
    const bool is_signed = !f.mins && f.zero == 0;  // codes that are bytes as they are
    for (int at = 0; at < n; at += SUPERBLOCK, row += size) {
        const uint8_t* rows[LANES];
        for (int r = 0; r < LANES; ++r) rows[r] = row;
        Padded last;
        const int columns = n - at < SUPERBLOCK ? n - at : SUPERBLOCK;
        if (columns < SUPERBLOCK) last.fill(rows, columns / f.info.block * f.info.bytes, size);
        Tile w;
        f.unpack(f, rows, row, false, w);
        for (int k = 0; k < columns; ++k) {
            const int g = k / f.group;
            int code = byte_at(w.codes, k), scale = 1, min = 1;
            if (is_signed) code = (int8_t)code;
            if (f.part == SUPERBLOCK) {
                scale = byte_at(w.w.scales, g);
                if (f.mins)
                    min = byte_at(w.w.mins, g);
                else
                    scale = (int8_t)scale;
            }
            out[at + k] = w.d[k / f.part][0] * (float)scale * (float)(code - f.zero);
            if (f.mins) out[at + k] = out[at + k] - w.dmin[k / f.part][0] * (float)min;
        }
    }
}

static void dequantise(int ggml_type, const uint8_t* row, int n, float* out) {
    switch (ggml_type) {
        case 0: return dequantise_float<AsF32>(row, n, out);
        case 1: return dequantise_float<AsF16>(row, n, out);
        case 30: return dequantise_float<AsBF16>(row, n, out);
    }
    dequantise_quantised(*quantised_format(ggml_type), row, n, out);
}

}  // namespace isobit::ISOBIT_SIMD
