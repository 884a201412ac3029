// Matrix products, docs/numerics.md section 4: LANES rows at a time, a superblock unpacked once for
// up to TOKEN_BLOCK tokens, the integers exact in any order, the float steps in the written one.
#pragma once

namespace isobit::ISOBIT_SIMD {

constexpr int TOKEN_BLOCK = 64;

FN F to_float(I v) { return __builtin_convertvector(v, F); }

// T = f(H) * 256 + f(L), or f(S).
template <int P>
FN F join(const I* sums) {
    if constexpr (P == 1) return to_float(sums[0]);
    return to_float(sums[0]) * 256.0f + to_float(sums[1]);
}

// Sub-scales or mins (pairs) times the sums of each group's activations in one plane.
template <class Format>
FN I dot_sums(const U* pairs, const Activations& x, int plane) {
    constexpr int n = 128 / Format::group;
    const int16_t* sums = Format::group == 16 ? x.sum16[plane] : x.sum32[plane];
    I sum = {};
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i) sum += madd(pairs[i], broadcast(sums + 2 * i));
    return sum;
}

// k-quants: y[t] += d_x * (d * T - dmin * M) for one superblock and T tokens.
template <class Format, int P, int T>
FN void add_superblock(const WeightTile& w, int, const Activations* const* x, F* y) {
    constexpr int group = Format::group / 4;  // in dwords
    constexpr int steps = run(Format::largest) < group ? run(Format::largest) : group;
    static_assert(group % steps == 0);
    I sums[T][P] = {};
    for (int j0 = 0; j0 < 64; j0 += steps) {
        Part part[T][P] = {};
#pragma GCC unroll 8
        for (int j = j0; j < j0 + steps; ++j)
            for (int t = 0; t < T; ++t)
                for (int p = 0; p < P; ++p)
                    part[t][p] = dot(part[t][p], w.codes[j], broadcast(x[t]->plane[p] + 4 * j));
        for (int t = 0; t < T; ++t)
            for (int p = 0; p < P; ++p)
                sums[t][p] = scale_add(sums[t][p], part[t][p], w.scale[j0 / group]);
    }
    for (int t = 0; t < T; ++t) {
        if constexpr (Format::zero != 0)
            for (int p = 0; p < P; ++p)
                sums[t][p] -= Format::zero * dot_sums<Format>(w.zero, *x[t], p);
        F u = w.d[0] * join<P>(sums[t]);
        if constexpr (Format::mins) {
            I m = dot_sums<Format>(w.mins, *x[t], 0);
            if constexpr (P == 2) m = (m << 8) + dot_sums<Format>(w.mins, *x[t], 1);
            u = u - w.dmin[0] * to_float(m);
        }
        y[t] = y[t] + x[t]->d * u;
    }
}

// The dot product of one block of 32.
template <class Format>
FN I dot32(const U* codes, const int8_t* x) {
    if constexpr (Format::largest > 127) {
        Part8 part = {};
        for (int j = 0; j < 8; ++j) part = dot8(part, codes[j], broadcast(x + 4 * j));
        return total8(part);
    } else {
        constexpr int steps = run(Format::largest) < 8 ? run(Format::largest) : 8;
        I sum = {};
        for (int j0 = 0; j0 < 8; j0 += steps) {
            Part part = {};
            for (int j = j0; j < j0 + steps; ++j)
                part = dot(part, codes[j], broadcast(x + 4 * j));
            sum += total(part);
        }
        return sum;
    }
}

// Formats of n 32-value blocks a superblock: y[t] += d_x * (((0 + u_0) + u_1) + ...).
template <class Format, int P, int T>
FN void add_blocks(const WeightTile& w, int n, const Activations* const* x, F* y) {
    for (int t = 0; t < T; ++t) {
        F sum = {};
        for (int b = 0; b < n; ++b) {
            I sums[P];
            for (int p = 0; p < P; ++p)
                sums[p] = dot32<Format>(w.codes + 8 * b, x[t]->plane[p] + 32 * b) -
                          Format::zero * x[t]->sum32[p][b];
            F u = w.d[b] * join<P>(sums);
            if constexpr (Format::mins) {
                int m = x[t]->sum32[0][b];
                if constexpr (P == 2) m = m * 256 + x[t]->sum32[1][b];
                u = u - w.dmin[b] * (float)m;
            }
            sum = sum + u;
        }
        y[t] = y[t] + x[t]->d * sum;
    }
}

template <class Format, int P, int T>
FN void add_tokens(const WeightTile& w, int n, const Activations* const* x, F* y) {
    if constexpr (Format::block == SUPERBLOCK)
        add_superblock<Format, P, T>(w, n, x, y);
    else
        add_blocks<Format, P, T>(w, n, x, y);
}

// Rows [row, row + LANES) of the product, those below end stored, for tokens [t0, t0 + n).
template <class Format, int P>
void matmul_tile(const Product& m, int row, int end, int t0, int n) {
    const uint8_t* rows[LANES];
    for (int r = 0; r < LANES; ++r)
        rows[r] = m.w + (row + r < end ? row + r : end - 1) * m.row_bytes;
    const int superblocks = blocks_of(m.columns);
    const Activations* x[TOKEN_BLOCK];
    F y[TOKEN_BLOCK];
    for (int i = 0; i < n; ++i) {
        x[i] = m.q + (size_t)(m.x_rows ? m.x_rows[t0 + i] : t0 + i) * superblocks;
        y[i] = F{};
    }
    const int blocks = m.columns / Format::block;
    constexpr int per_superblock = SUPERBLOCK / Format::block;
    const size_t ahead = LANES * m.row_bytes;  // the next tile of rows
    for (int s = 0; s < superblocks; ++s) {
        int left = blocks - s * per_superblock;
        int count = left < per_superblock ? left : per_superblock;
        WeightTile w;
        Format::unpack(rows, count, w);
        for (int r = 0; r < LANES; ++r) {
            for (int i = 0; i < count * Format::bytes; i += 64) prefetch(rows[r] + ahead + i);
            rows[r] += count * Format::bytes;
        }
        int i = 0;
        for (; i + 4 <= n; i += 4) add_tokens<Format, P, 4>(w, count, x + i, y + i);
        for (; i < n; ++i) add_tokens<Format, P, 1>(w, count, x + i, y + i);
        for (i = 0; i < n; ++i) ++x[i];
    }
    const int valid = end - row < LANES ? end - row : LANES;
    for (int i = 0; i < n; ++i) {
        size_t token = m.y_rows ? m.y_rows[t0 + i] : t0 + i;
        memcpy(m.y + token * m.y_stride + row, &y[i], valid * sizeof(float));
    }
}

template <class Format, int P>
void matmul_quantised(const Product& m, int begin, int end) {
    for (int t = 0; t < m.tokens; t += TOKEN_BLOCK) {
        int n = m.tokens - t < TOKEN_BLOCK ? m.tokens - t : TOKEN_BLOCK;
        for (int row = begin; row < end; row += LANES) matmul_tile<Format, P>(m, row, end, t, n);
    }
}

// Float weights: y = sum256(W_k * x_k), W converted exactly.

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
    FN float value(const uint8_t* p) {
        uint16_t x;
        memcpy(&x, p, 2);
        uint32_t sign = (uint32_t)(x & 0x8000) << 16, rest = x & 0x7fff;
        // As a binary32 the exponent is 112 too small; multiplying is exact and mends subnormals.
        float y = from_bits(rest << 13) * from_bits(0x77800000u);
        uint32_t special = rest >= 0x7c00 ? 0x7f800000u : 0;
        return from_bits(bits(y) | special | sign);
    }
};

template <class Format>
void matmul_float(const Product& m, int begin, int end) {
    for (int row = begin; row < end; ++row) {
        const uint8_t* w = m.w + (size_t)row * m.row_bytes;
        for (int t = 0; t < m.tokens; ++t) {
            const float* x = m.x + (size_t)(m.x_rows ? m.x_rows[t] : t) * m.columns;
            Lanes256 lanes;
            int k = 0;
            for (; k + 256 <= m.columns; k += 256)
                for (int i = 0; i < 256; ++i)
                    lanes.v[i] += Format::value(w + (size_t)(k + i) * Format::bytes) * x[k + i];
            for (int i = 0; k + i < m.columns; ++i)
                lanes.v[i] += Format::value(w + (size_t)(k + i) * Format::bytes) * x[k + i];
            m.y[(m.y_rows ? m.y_rows[t] : t) * m.y_stride + row] = lanes.sum();
        }
    }
}

template <int P>
Matmul matmul_of(int ggml_type) {
    switch (ggml_type) {
        case 0: return matmul_float<AsF32>;
        case 1: return matmul_float<AsF16>;
        case 30: return matmul_float<AsBF16>;
        case 2: return matmul_quantised<Q4_0, P>;
        case 3: return matmul_quantised<Q4_1, P>;
        case 6: return matmul_quantised<Q5_0, P>;
        case 7: return matmul_quantised<Q5_1, P>;
        case 8: return matmul_quantised<Q8_0, P>;
        case 10: return matmul_quantised<Q2_K, P>;
        case 11: return matmul_quantised<Q3_K, P>;
        case 12: return matmul_quantised<Q4_K, P>;
        case 13: return matmul_quantised<Q5_K, P>;
        case 14: return matmul_quantised<Q6_K, P>;
    }
    return nullptr;
}

static Matmul matmul(int ggml_type, int planes) {
    return planes == 2 ? matmul_of<2>(ggml_type) : matmul_of<1>(ggml_type);
}

}  // namespace isobit::ISOBIT_SIMD
