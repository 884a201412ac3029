// Several tokens times a superblock, by a matrix unit (amx.h): for formats of 256-value blocks, whose
// integers can be summed in any order. A weight times its sub-scale has up to 14 bits, so it is two bytes,
// and all 256 values of 16 rows are summed without a step between.
#pragma once

#include "amx.h"

namespace isobit::ISOBIT_SIMD {

constexpr int ENOUGH_TOKENS = 4;  // fewer cost less by vectors

struct ScaledWeights {
    U low[64], high[64];  // unsigned and signed, laid out as Tile::codes
};

// (code - zero) * sub-scale.
template <class S>
FN void scale_weights(const Tile& w, int zero, ScaledWeights& scaled) {
    const __m512i zeros = _mm512_set1_epi8((char)S::zero(zero));
    for (int g = 0; g < SUPERBLOCK / S::group; ++g) {
        // The scale beside the even bytes, then beside the odd ones: the other one adds nothing.
        const U byte = w.scale[g] & 255;
        const __m512i even = (__m512i)(byte | byte << 16), odd = _mm512_slli_epi16(even, 8);
        const __m512i offset = _mm512_maddubs_epi16(zeros, even);
#pragma GCC unroll 8
        for (int j = S::group / 4 * g; j < S::group / 4 * (g + 1); ++j) {
            __m512i a = _mm512_maddubs_epi16((__m512i)w.codes[j], even);
            __m512i b = _mm512_maddubs_epi16((__m512i)w.codes[j], odd);
            if (!S::mins) a = _mm512_sub_epi16(a, offset), b = _mm512_sub_epi16(b, offset);
            scaled.low[j] = (U)_mm512_mask_blend_epi8(0xaaaaaaaaaaaaaaaa, a, _mm512_slli_epi16(b, 8));
            scaled.high[j] = (U)_mm512_mask_blend_epi8(0xaaaaaaaaaaaaaaaa, _mm512_srli_epi16(a, 8), b);
        }
    }
}

// A quarter of the values: to the sums of the weights' low and high bytes, for each plane of tokens.
template <class Unit, int P>
FN void add_quarter(const int8_t (*x)[TILE_ROWS][SUPERBLOCK], const ScaledWeights& w, int quarter) {
    Unit::template load<6>(w.low + 16 * quarter, sizeof(U));
    Unit::template load<7>(w.high + 16 * quarter, sizeof(U));
    Unit::template load<4>(x[0][0] + 64 * quarter, SUPERBLOCK);
    Unit::template dot_unsigned<0, 4, 6>();
    Unit::template dot<1, 4, 7>();
    if constexpr (P == 2) {
        Unit::template load<5>(x[1][0] + 64 * quarter, SUPERBLOCK);
        Unit::template dot_unsigned<2, 5, 6>();
        Unit::template dot<3, 5, 7>();
    }
}

template <class Unit, class S, int P>
APART void multiply_amx(Tile& w, int zero, const Activations* const* x, int n, F* y) {
    ScaledWeights scaled;
    scale_weights<S>(w, zero, scaled);
    const int tokens = tokens_at_once(n);
    for (int first = 0; first < n; first += tokens) {
        alignas(64) int8_t planes[P][TILE_ROWS][SUPERBLOCK];
        for (int t = 0; t < tokens; ++t) {
            const Activations& from = *x[first + t < n ? first + t : n - 1];
            for (int p = 0; p < P; ++p) memcpy(planes[p][t], from.plane[p], SUPERBLOCK);
        }
        I sums[2 * P][TILE_ROWS];
        Unit::template clear<0>(), Unit::template clear<1>();
        if constexpr (P == 2) Unit::template clear<2>(), Unit::template clear<3>();
        for (int quarter = 0; quarter < 4; ++quarter) add_quarter<Unit, P>(planes, scaled, quarter);
        Unit::template store<0>(sums[0], sizeof(I)), Unit::template store<1>(sums[1], sizeof(I));
        if constexpr (P == 2)
            Unit::template store<2>(sums[2], sizeof(I)), Unit::template store<3>(sums[3], sizeof(I));
        for (int t = 0; t < tokens && first + t < n; ++t) {
            I whole[P];
            for (int p = 0; p < P; ++p) whole[p] = sums[2 * p][t] + (sums[2 * p + 1][t] << 8);
            add_sums<S, P>(w.w, whole, *x[first + t], y[first + t]);
        }
    }
}

// A format and what multiplies it; null: it has no such form.
struct ByUnit {
    const Quantised* format;
    Multiply multiply;
};

template <class Unit, int P>
void matmul_by_unit(const void* format, const Product& m, int begin, int end) {
    const auto [f, multiply] = *(const ByUnit*)format;
    each_token_block(m, [&](int t, int n) __attribute__((always_inline)) {
        if (n < ENOUGH_TOKENS) return token_block<P>(*f, m, false, begin, end, t, n);
        const typename Unit::Use use(tokens_at_once(n));
        for (int row = begin; row < end; row += LANES)
            several(*f, m, multiply, false, row, end, t, n);
    });
}

template <class Format, class Unit, int P>
constexpr ByUnit by_unit() {
    if constexpr (Format::block == SUPERBLOCK)
        return {quantised_format(Format::id), multiply_amx<Unit, ShapeOf<Format>, P>};
    return {};
}

template <class Unit, int P>
FN Matmul find_by_unit(int ggml_type) {
    static constexpr ByUnit all[] = {
#define ISOBIT_FORMAT(Format) by_unit<Format, Unit, P>(),
        ISOBIT_QUANTISED(ISOBIT_FORMAT)
#undef ISOBIT_FORMAT
    };
    for (const ByUnit& f : all)
        if (f.format && f.format->info.type == ggml_type) return {matmul_by_unit<Unit, P>, &f};
    return {};
}

template <class Unit>
static Matmul matmul_amx(int ggml_type, int planes) {
    const Matmul found = planes == 2 ? find_by_unit<Unit, 2>(ggml_type) : find_by_unit<Unit, 1>(ggml_type);
    return found ? found : matmul<false>(ggml_type, planes);
}

}  // namespace isobit::ISOBIT_SIMD
