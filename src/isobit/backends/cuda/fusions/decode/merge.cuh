// The results of attention's tiles, merged in ascending order (docs/numerics.md, section 6).
#pragma once
#include "step.cuh"
#include "weigh.cuh"

constexpr int GROUP = HEADS / KV_HEADS;  // query heads of one key-value head
constexpr int FEW_TILES = 4;             // that the product after attention merges itself

// Eight columns of attention's output times the sigmoid of a gate, of which a head's stands behind its query.
DEV void gate_columns(const float* gate, int column, float (&v)[8]) {
    float g[8];
    load8(gate + column / HEAD_DIM * 2 * HEAD_DIM + column % HEAD_DIM, g);
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] = mul(v[i], sigmoid(g[i]));
}

// For each key-value head: max_and_sum [most][GROUP], out [most][GROUP][HEAD_DIM].
struct TileResults {
    const float2* max_and_sum;
    const float* out;
    int most, tiles;

    // Where a head's results begin, and eight of its columns.
    struct Place {
        const float2* max_and_sum;
        const float* out;
    };
    DEV int64 index(int head, int t) const {
        return (int64(head / GROUP) * most + t) * GROUP + head % GROUP;
    }
    DEV Place place(int column) const {
        int64 first = index(column / HEAD_DIM, 0);
        return {max_and_sum + first, out + first * HEAD_DIM + column % HEAD_DIM};
    }
    template <int ROUND, bool MANY>
    DEV void merged(int column, float (&o)[8]) const {
        merged<ROUND, MANY>(place(column), o);
    }
    // Eight columns of the whole output. ROUND: tiles that are read at once; MANY: any number of
    // tiles, else at most so many.
    template <int ROUND, bool MANY>
    DEV void merged(const Place& at, float (&o)[8]) const {
        float m = isobit::from_bits(0xff800000u), l = 0.0f;
#pragma unroll
        for (int i = 0; i < 8; i++) o[i] = 0.0f;
#pragma unroll 1
        for (int first = 0; first < tiles; first += ROUND) {
            float2 ml[ROUND];
            float4 v[ROUND][2];
            float a[ROUND], b[ROUND];
#pragma unroll
            for (int t = 0; t < ROUND; t++) {
                ml[t] = make_float2(isobit::from_bits(0xff800000u), 0.0f);
                if (first + t < tiles) {
                    ml[t] = at.max_and_sum[(first + t) * GROUP];
                    const float* from = at.out + (first + t) * (GROUP * HEAD_DIM);
                    v[t][0] = reinterpret_cast<const float4*>(from)[0];
                    v[t][1] = reinterpret_cast<const float4*>(from)[1];
                }
            }
#pragma unroll
            for (int t = 0; t < ROUND; t++) {  // factors side by side
                if (!MANY && t == 0) m = ml[t].x;
                else merge_factors(m, ml[t].x, a[t], b[t]);
            }
#pragma unroll
            for (int t = 0; t < ROUND; t++) {
                if (first + t >= tiles) break;
                float next[8];
                spread(v[t], next);
                if (!MANY && t == 0) {  // what is the first
                    l = ml[t].y;
#pragma unroll
                    for (int i = 0; i < 8; i++) o[i] = next[i];
                    continue;
                }
                l = add(mul(l, a[t]), mul(ml[t].y, b[t]));
#pragma unroll
                for (int i = 0; i < 8; i++) o[i] = add(mul(o[i], a[t]), mul(next[i], b[t]));
            }
            if (!MANY) break;
        }
        float r = div(1.0f, l);
#pragma unroll
        for (int i = 0; i < 8; i++) o[i] = mul(o[i], r);
    }
    DEV static void spread(const float4 (&v)[2], float (&o)[8]) {
        o[0] = v[0].x, o[1] = v[0].y, o[2] = v[0].z, o[3] = v[0].w;
        o[4] = v[1].x, o[5] = v[1].y, o[6] = v[1].z, o[7] = v[1].w;
    }
};
