// Sums, fixed point and what several operations do value by value, docs/numerics.md sections 2, 3 and
// 5: plain loops that the compiler turns into vectors of this level.
#pragma once

namespace isobit::ISOBIT_SIMD {

// sum256: add value j to v[j % 256] in ascending order, then sum().
struct Lanes256 {
    float v[256] = {};

    template <int N>
    FN void fold(float* v) {
        for (int i = 0; i < N; ++i) v[i] += v[i + N];
    }
    float sum() {
        fold<128>(v);
        fold<64>(v);
        return tree64(v);
    }
    FN float tree64(float* v) {
        fold<32>(v);
        fold<16>(v);
        fold<8>(v);
        fold<4>(v);
        fold<2>(v);
        return v[0] + v[1];
    }
};

FN float sum256(const float* x, int n) {
    Lanes256 lanes;
    for (int k = 0; k < n; k += 256)
        for (int i = 0; i < 256 && k + i < n; ++i) lanes.v[i] += x[k + i];
    return lanes.sum();
}

FN uint32_t largest_bits(const float* x, int n) {
    uint32_t most = 0;
    for (int i = 0; i < n; ++i) {
        uint32_t b = bits(x[i]) & 0x7fffffffu;
        most = b > most ? b : most;
    }
    return most;
}

// n integers of one block; returns the block's scale.
FN float quantise_block(const float* x, int n, int planes, int16_t* q) {
    BlockScale s = block_scale(largest_bits(x, n), planes);
    if (s.r == 0)
        memset(q, 0, n * sizeof *q);
    else
        for (int i = 0; i < n; ++i) q[i] = (int16_t)isobit::quantise(x[i], s.r);
    return s.d;
}

FN void quantise_head(const float* x, int n, int16_t* q, float* d) {
    *d = quantise_block(x, n, 2, q);
}

FN void quantise(const float* x, int n, int planes, Activations* out, int16_t* words) {
    for (; n > 0; n -= SUPERBLOCK, x += SUPERBLOCK, ++out) {
        int16_t q[SUPERBLOCK] = {};
        out->d = quantise_block(x, n < SUPERBLOCK ? n : SUPERBLOCK, planes, q);
        for (int i = 0; i < SUPERBLOCK; ++i) {
            int high = planes == 2 ? high_plane(q[i]) : q[i];
            out->plane[0][i] = (int8_t)high;
            out->plane[1][i] = (int8_t)(q[i] - high * 256);
        }
        if constexpr (WORDS) {
            out->words = words;
            for (int i = 0; i < SUPERBLOCK; i += 4, words += 4)
                words[0] = q[i], words[1] = q[i + 2], words[2] = q[i + 1], words[3] = q[i + 3];
        }
        for (int p = 0; p < planes; ++p) {
            for (int g = 0; g < 16; ++g) {
                int16_t sum = 0;
                for (int i = 0; i < 16; ++i) sum += out->plane[p][16 * g + i];
                out->sum16[p][g] = sum;
            }
            for (int g = 0; g < 8; ++g)
                out->sum32[p][g] = out->sum16[p][2 * g] + out->sum16[p][2 * g + 1];
        }
    }
}

FN float sigmoid_of(float x) { return 1.0f / (1.0f + isobit::exp(-x)); }

FN void silu_gate(const float* gate, const float* up, int n, float* y) {
    for (int i = 0; i < n; ++i) y[i] = isobit::silu_gate(gate[i], up[i]);
}

FN void add(const float* x, const float* y, int n, float* out) {
    for (int i = 0; i < n; ++i) out[i] = x[i] + y[i];
}

}  // namespace isobit::ISOBIT_SIMD
