// Several tokens times rows of weights, by a matrix unit (amx.h): for formats of 256-value blocks, whose
// integers can be summed in any order. A weight times its sub-scale has up to 14 bits, so it is two
// digits, and the unit sums all 256 values of 16 rows and 16 tokens without a step between. While it
// does, vectors finish the tokens before: only so are both at work all the time, for what the unit
// stores is long on its way to where vectors load it.
#pragma once

#include "amx.h"

namespace isobit::ISOBIT_SIMD {

constexpr int ENOUGH_TOKENS = 4;  // fewer cost less by vectors

// A superblock of 16 rows: value = low + (high << digit_bits), each laid out as Tile::codes.
struct Digits {
    U low[64], high[64];  // high ones signed if the sub-scales are
    F d, dmin;
    U mins[8];  // of pairs of groups
};

// So that a code times a digit of an unsigned sub-scale is a byte; else the digits are bytes of the product.
template <class Format>
constexpr int digit_bits = Format::signed_scales ? 8 : Format::largest * 15 < 256 ? 4 : 3;

FN U multiply_words(U a, U b) { return (U)_mm512_mullo_epi16((__m512i)a, (__m512i)b); }

// Codes times an unsigned sub-scale: products of words, of which none carries into the next byte.
template <class Format>
struct UnsignedScales {
    U low[4], high[4];
    INLINE explicit UnsignedScales(const Scales& w) {
        constexpr int bits = digit_bits<Format>;
#pragma GCC unroll 4
        for (int i = 0; i < 64 / Format::group; ++i) {
            low[i] = w.scales[i] & 0x01010101u * ((1 << bits) - 1);
            high[i] = w.scales[i] >> bits & 0x01010101u * (255 >> bits);
        }
    }
    INLINE void multiply(int j, U codes, Digits& to) const {
        const int g = 4 * j / Format::group;
        to.low[j] = multiply_words(codes, byte_pairs(low[g / 4], g % 4, g % 4));
        to.high[j] = multiply_words(codes, byte_pairs(high[g / 4], g % 4, g % 4));
    }
};

// (code - zero) times a signed sub-scale. The scale is beside the even bytes, then beside the odd ones:
// the other one adds nothing.
template <class Format>
struct SignedScales {
    U scales[4];
    INLINE explicit SignedScales(const Scales& w) { memcpy(scales, w.scales, sizeof scales); }
    INLINE void multiply(int j, U codes, Digits& to) const {
        const int g = 4 * j / Format::group;
        const __m512i even = (__m512i)byte_pairs(scales[g / 4], g % 4, g % 4), odd = _mm512_slli_epi16(even, 8);
        const __m512i offset = _mm512_maddubs_epi16(_mm512_set1_epi8((char)Format::zero), even);
        const __m512i a = _mm512_sub_epi16(_mm512_maddubs_epi16((__m512i)codes, even), offset);
        const __m512i b = _mm512_sub_epi16(_mm512_maddubs_epi16((__m512i)codes, odd), offset);
        to.low[j] = (U)_mm512_mask_blend_epi8(0xaaaaaaaaaaaaaaaa, a, _mm512_slli_epi16(b, 8));
        to.high[j] = (U)_mm512_mask_blend_epi8(0xaaaaaaaaaaaaaaaa, _mm512_srli_epi16(a, 8), b);
    }
};

template <bool is_signed, class Format>
struct ScalesOf {
    typedef UnsignedScales<Format> type;
};
template <class Format>
struct ScalesOf<true, Format> {
    typedef SignedScales<Format> type;
};

template <class Format>
APART void unpack_digits(Rows rows, const uint8_t* ahead, Digits& to) {
    Scales w;
    Format::scales(rows, w);
    to.d = w.d;
    if constexpr (Format::mins) {
        to.dmin = w.dmin;
#pragma GCC unroll 8
        for (int i = 0; i < 128 / Format::group; ++i)
            to.mins[i] = byte_pairs(w.mins[i / 2], i % 2 * 2, i % 2 * 2 + 1);
    }
    const typename ScalesOf<Format::signed_scales, Format>::type scales(w);
    int n = 0;
    Format::codes(rows, [&](int j, U codes) __attribute__((always_inline)) {
        prefetch_line<Format>(ahead, n++, codes, false);
        scales.multiply(j, codes, to);
    });
}

// Some tokens of one superblock, from `from` to `to` still to be finished.
template <int P>
struct Summed {
    const Digits* w;
    const Activations* x;  // of the first, and so many blocks to the next
    int stride;
    F* y;
    int from = 0, to = 0;
    I sums[2 * P][TILE_ROWS];
};

template <int group>
FN I dot_mins(const Digits& w, const Activations& x, int plane) {
    return dot_pairs<group>(x, plane, [&](int i) __attribute__((always_inline)) { return w.mins[i]; });
}

// The digits' sums as one, to y.
template <class Format, int P>
FN void finish(const Summed<P>& s, int t) {
    I whole[P];
#pragma GCC unroll 2
    for (int p = 0; p < P; ++p) whole[p] = s.sums[2 * p][t] + (s.sums[2 * p + 1][t] << digit_bits<Format>);
    add_sums<Format, P>(*s.w, whole, s.x[(size_t)t * s.stride], s.y[t]);
}

// A quarter of the values: to the sums of the weights' low and high digits, for each plane of tokens.
template <class Format, class Unit, int P>
FN void add_quarter(const Activations* x, size_t stride, const Digits& w, int quarter) {
    Unit::template load<6>(w.low + 16 * quarter, sizeof(U));
    Unit::template load<4>(x->plane[0] + 64 * quarter, stride);
    Unit::template load<7>(w.high + 16 * quarter, sizeof(U));
    Unit::template dot<0, 4, 6, false>();
    if constexpr (P == 2) Unit::template load<5>(x->plane[1] + 64 * quarter, stride);
    Unit::template dot<1, 4, 7, Format::signed_scales>();
    if constexpr (P == 2) {
        Unit::template dot<2, 5, 6, false>();
        Unit::template dot<3, 5, 7, Format::signed_scales>();
    }
}

// The next tokens' sums, while the last ones are finished.
template <class Format, class Unit, int P>
FN void add_tokens_by_unit(const Summed<P>& last, Summed<P>& next) {
    const int each = (last.to + 3) / 4;
    Unit::template clear<0>(), Unit::template clear<1>();
    if constexpr (P == 2) Unit::template clear<2>(), Unit::template clear<3>();
#pragma GCC unroll 4
    for (int quarter = 0; quarter < 4; ++quarter) {
        add_quarter<Format, Unit, P>(next.x, next.stride * sizeof(Activations), *next.w, quarter);
        const int begin = quarter * each, end = begin + each < last.to ? begin + each : last.to;
        for (int t = begin < last.from ? last.from : begin; t < end; ++t) finish<Format>(last, t);
    }
    Unit::template store<0>(next.sums[0], sizeof(I)), Unit::template store<1>(next.sums[1], sizeof(I));
    if constexpr (P == 2)
        Unit::template store<2>(next.sums[2], sizeof(I)), Unit::template store<3>(next.sums[3], sizeof(I));
}

FN void fetch_tile(const Product& m, int row, int end, int t, F& y) {
    const float* from = tile_of(m, row, t);
    for (int r = 0; r < LANES && row + r < end; ++r) y[r] = from[r];
}

// Superblocks [begin, begin + count) of a tile of rows and n tokens, `stride` blocks apart.
template <class Format, class Unit, int P>
APART void several_by_unit(const Product& m, int row, int end, int t0, int n, int begin, int count,
                           const Activations* x, int stride) {
    const uint8_t* rows[LANES];
    tile_rows(m, row, end, rows);
    for (int r = 0; r < LANES; ++r) rows[r] += (size_t)begin * Format::bytes;
    F y[TOKEN_BLOCK] = {};
    if (begin)
        for (int i = 0; i < n; ++i) fetch_tile(m, row, end, t0 + i, y[i]);
    Digits both[2];
    Summed<P> summed[2];
    int now = 0;
    const int tokens = tokens_at_once(n);
    for (int s = begin; s < begin + count; ++s, ++x) {
        Digits& w = both[s & 1];
        unpack_digits<Format>(rows, ahead_of(m, row, end, s, LANES * Format::bytes), w);
        for (int r = 0; r < LANES; ++r) rows[r] += Format::bytes;
        for (int done = 0; done < n; done += tokens, now ^= 1) {
            const int first = done < n - tokens ? done : n - tokens;  // again some that are done
            Summed<P>& next = summed[now];
            next.w = &w, next.x = x + (size_t)first * stride, next.stride = stride, next.y = y + first;
            add_tokens_by_unit<Format, Unit>(summed[now ^ 1], next);
            next.from = done - first, next.to = tokens;
        }
    }
    for (int t = summed[now ^ 1].from; t < summed[now ^ 1].to; ++t) finish<Format>(summed[now ^ 1], t);
    for (int i = 0; i < n; ++i) store_tile(m, row, end, t0 + i, y[i]);
}

// Tokens that lie apart are brought together, of so many superblocks at a time.
constexpr int TOGETHER = 8;

template <class Format, class Unit, int P>
void matmul_by_unit(const void* format, const Product& m, int begin, int end) {
    const int blocks = blocks_of(m.columns);
    each_token_block(m, [&](int t, int n) __attribute__((always_inline)) {
        if (n < ENOUGH_TOKENS) return token_block<P>(*(const Quantised*)format, m, false, begin, end, t, n);
        const typename Unit::Use use(tokens_at_once(n));
        if (!m.x_rows) {
            for (int row = begin; row < end; row += LANES)
                several_by_unit<Format, Unit, P>(m, row, end, t, n, 0, blocks, inputs(m, t), blocks);
            return;
        }
        Activations x[TOKEN_BLOCK][TOGETHER];
        for (int s = 0; s < blocks; s += TOGETHER) {
            const int count = blocks - s < TOGETHER ? blocks - s : TOGETHER;
            for (int i = 0; i < n; ++i) memcpy(x[i], inputs(m, t + i) + s, count * sizeof(Activations));
            for (int row = begin; row < end; row += LANES)
                several_by_unit<Format, Unit, P>(m, row, end, t, n, s, count, x[0], TOGETHER);
        }
    });
}

// A format and what multiplies it; null: it has no such form.
struct ByUnit {
    const Quantised* format;
    void (*f)(const void*, const Product&, int, int);
};

template <class Format, class Unit, int P>
constexpr ByUnit by_unit() {
    if constexpr (Format::block == SUPERBLOCK)
        return {quantised_format(Format::id), matmul_by_unit<Format, Unit, P>};
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
        if (f.format && f.format->info.type == ggml_type) return {f.f, f.format};
    return {};
}

template <class Unit>
static Matmul matmul_amx(int ggml_type, int planes) {
    const Matmul found = planes == 2 ? find_by_unit<Unit, 2>(ggml_type) : find_by_unit<Unit, 1>(ggml_type);
    return found ? found : matmul<false>(ggml_type, planes);
}

}  // namespace isobit::ISOBIT_SIMD
