// From a tile's scores to its integer weights (docs/numerics.md, section 6), as products with tensor cores
// hold them: a row's 64 keys in the four lanes that share it, columns of 8 keys, [column][fragment] of
// product32 (mma.cuh).
#pragma once
#include "cache.cuh"

constexpr int KEY_COLUMNS = KV_PAGE / 8;

// The larger of two, or a NaN that one of them is.
#ifdef EMULATED
DEV float max_or_nan(float a, float b) { return a != a || a > b ? a : b; }
#else
DEV float max_or_nan(float a, float b) {
    float r;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
    return r;
}
#endif

// The larger over the four lanes that share a row.
DEV float row_max(float v) {
    v = max_or_nan(v, shuffle_xor(v, 1));
    return max_or_nan(v, shuffle_xor(v, 2));
}
DEV uint32 row_max(uint32 v) {
    v = max(v, shuffle_xor(v, 1));
    return max(v, shuffle_xor(v, 2));
}

// tree() over a row's 64 values: columns of 8 first, then the lanes of the row, then neighbours.
DEV float row_tree(const float (&p)[KEY_COLUMNS][4], int row) {
    float v[2];
    for (int e = 0; e < 2; e++) {
        int i = 2 * row + e;
        float a = add(p[0][i], p[4][i]), b = add(p[1][i], p[5][i]);
        float c = add(p[2][i], p[6][i]), d = add(p[3][i], p[7][i]);
        v[e] = add(add(a, c), add(b, d));
        v[e] = add(v[e], shuffle_xor(v[e], 2));
        v[e] = add(v[e], shuffle_xor(v[e], 1));
    }
    return add(v[0], v[1]);
}

// Four biased integers that are not negative to bytes of both planes.
DEV void pack_planes(const float (&biased)[4], int& high, int& low) {
    uint32 pair[2];
#pragma unroll
    for (int i = 0; i < 2; i++)
        pair[i] = __byte_perm(isobit::bits(biased[2 * i]), isobit::bits(biased[2 * i + 1]), 0x5410);
    low = __byte_perm(pair[0], pair[1], 0x6420);
    high = __byte_perm(pair[0] + 0x00800080u, pair[1] + 0x00800080u, 0x7531);
}

// exp(x) of x that is not above 0; of a NaN, anything.
DEV float weight_of(float x) {
    float integer;
    float p = isobit::exp_part(x, integer);
    // Not less than exp(-87): adding to the exponent is the product with 2^n.
    float y = isobit::from_bits(isobit::bits(p) + (isobit::bits(integer) << 23));
    return x < -87.0f ? 0.0f : y;
}

// Scores p of the tile to m, l and g of section 6 and to the integer weights as A fragments, [plane]
// [32 keys][fragment]; see value_slot. dv: the tile's scales of values. seen: the last key of the tile that a row
// sees; WHOLE: all of them, in both rows. Where a score or m is not finite, l is a NaN.
template <bool WHOLE>
DEV void weigh(const float* dv, float (&p)[KEY_COLUMNS][4], const int (&seen)[2], float (&m)[2], float (&l)[2],
               float (&g)[2], int (&weights)[2][2][4]) {
    int t = lane_id() % 4;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float top = isobit::from_bits(0xff800000u);
#pragma unroll
        for (int c = 0; c < KEY_COLUMNS; c++)
#pragma unroll
            for (int e = 0; e < 2; e++)
                if (WHOLE || 8 * c + 2 * t + e <= seen[r]) top = max_or_nan(top, p[c][2 * r + e]);
        m[r] = row_max(top);
#pragma unroll
        for (int c = 0; c < KEY_COLUMNS; c++)
#pragma unroll
            for (int e = 0; e < 2; e++) {  // no branches: many are under way at once
                float& v = p[c][2 * r + e];
                v = weight_of(sub(v, m[r]));
                v = WHOLE || 8 * c + 2 * t + e <= seen[r] ? v : 0.0f;
            }
        float sum = row_tree(p, r);
        l[r] = magnitude(m[r]) < 0x7f800000u ? sum : isobit::from_bits(0x7fc00000u);
        uint32 amax = 0;
#pragma unroll
        for (int c = 0; c < KEY_COLUMNS; c++) {
            float2 d = *reinterpret_cast<const float2*>(dv + 8 * c + 2 * t);
#pragma unroll
            for (int e = 0; e < 2; e++) {
                float& v = p[c][2 * r + e];
                v = mul(v, e ? d.y : d.x);
                // What no token has stored yet may be anything.
                v = WHOLE || 8 * c + 2 * t + e <= seen[r] ? v : 0.0f;
                amax = max(amax, isobit::bits(v));  // of no sign, or a NaN
            }
        }
        isobit::BlockScale scale = isobit::block_scale(row_max(amax), 2);
        g[r] = scale.d;
        // Where scale.r is 0, so are the integers, or g is NaN and they do not matter.
#pragma unroll
        for (int c = 0; c < KEY_COLUMNS; c += 2) {
            float biased[4];
#pragma unroll
            for (int i = 0; i < 4; i++)
                biased[i] = isobit::biased(mul(p[c + i / 2][2 * r + i % 2], scale.r));
            pack_planes(biased, weights[0][c / 4][c % 4 + r], weights[1][c / 4][c % 4 + r]);
        }
    }
}

// m becomes the larger of m and `next`; what is of the former m counts a times, what is of next b times. One of
// them is exp(0), which is 1.
DEV void merge_factors(float& m, float next, float& a, float& b) {
    float top = fmaxf(m, next);
    bool old = m == top;
    float e = isobit::exp(sub(old ? next : m, top));
    a = old ? 1.0f : e, b = old ? e : 1.0f;
    m = top;
}
// A tile's m and l to those of a row. If it sees none of the tile's keys, b is the factor that changes nothing.
DEV void merge_row(bool sees, float m_tile, float l_tile, float& m, float& l, float& a, float& b) {
    float top = m;
    merge_factors(top, m_tile, a, b);
    float sum = add(mul(l, a), mul(l_tile, b));
    a = sees ? a : 1.0f;
    b = sees ? b : -0.0f;
    l = sees ? sum : l;
    m = sees ? top : m;
}
// Outputs [column][fragment] times their rows' factors, which seldom are not 1.
template <int N>
DEV void scale_outputs(float (&o)[N][4], const float (&a)[2]) {
    if (!__ballot_sync(~0u, a[0] != 1.0f || a[1] != 1.0f)) return;
#pragma unroll
    for (int c = 0; c < N; c++)
#pragma unroll
        for (int i = 0; i < 4; i++) o[c][i] = mul(o[c][i], a[i / 2]);
}
