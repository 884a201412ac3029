// A superblock of LANES rows, unpacked to memory for several tokens. Unpacking knows the format;
// multiplying knows only its shape, which several formats share.
#pragma once

namespace isobit::ISOBIT_SIMD {

struct Quantised;

struct Tile {
    U codes[64];
    U scale[16];       // of each group, as scale_add takes it
    Scales w;          // of blocks of 256 values; of decoded formats the scales alone
    F d[16], dmin[8];  // of each block
    int blocks;        // of formats that multiply_decoded() takes: how many d there are
};

// T = f(H) * 256 + f(L), or f(S).
template <int P>
FN F combine_planes(const I* sums) {
    if constexpr (P == 1) return to_float(sums[0]);
    return to_float(sums[0]) * 256.0f + to_float(sums[1]);
}

// The sub-scale of group g, for scale_add.
template <class Format>
FN U sub_scale(const Scales& w, int g) {
    return Format::signed_scales ? signed_scale_at(w.scales[g / 4], g % 4)
                                 : scale_at(w.scales[g / 4], g % 4);
}

// Words times the sums of each group's activations in one plane; pair(i): those of the pair i of groups.
template <int group, class Pair>
FN I dot_pairs(const Activations& x, int plane, Pair&& pair) {
    const int16_t* sums = group == 16 ? x.sum16[plane] : x.sum32[plane];
    I sum = {};
#pragma GCC unroll 8
    for (int i = 0; i < 128 / group; ++i) sum = add_pairs(sum, pair(i), broadcast(sums + 2 * i));
    return sum;
}

// Sub-scales or mins, four groups in a lane.
template <int group, bool is_signed>
FN I dot_sums(const U* bytes, const Activations& x, int plane) {
    return dot_pairs<group>(x, plane, [=](int i) __attribute__((always_inline)) {
        const int b = i % 2 * 2;
        return is_signed ? signed_byte_pairs(bytes[i / 2], b, b + 1)
                         : byte_pairs(bytes[i / 2], b, b + 1);
    });
}

template <int group>
FN I dot_mins(const Scales& w, const Activations& x, int plane) {
    return dot_sums<group, false>(w.mins, x, plane);
}

// Codes for which dot() would not be exact over two steps have parts of another type.
template <bool wide>
struct PartType {
    typedef Part type;
};
template <>
struct PartType<true> {
    typedef WidePart type;
};
template <class Format>
constexpr bool wide = Format::largest > 127;

// Steps of dot() that one part can take: as far as it is exact, and within one group.
template <class Format>
constexpr int part_steps() {
    constexpr int group = Format::group / 4, limit = wide<Format> ? WIDE_RUN : max_unspilled_sums(Format::largest);
    int steps = limit < group ? limit : group;
    while (group % steps) --steps;
    return steps;
}

// What multiplying must know of a format.
template <int block_, int group_, int steps_, bool wide, bool mins_>
struct Shape {
    static constexpr int block = block_, group = group_, steps = steps_;
    static constexpr bool mins = mins_, words = WORDS && wide && block_ == 32;
    typedef typename PartType<wide>::type Part;
    FN int zero(int of_format) { return wide ? WIDE_ZERO : of_format; }
};
template <class Format>
using ShapeOf = Shape<Format::block, Format::group, part_steps<Format>(), wide<Format>, Format::mins>;

// y += d_x * (d * T - dmin * M), of one superblock's sums over scaled values.
template <class S, int P, class W>
FN void add_sums(const W& w, const I* sums, const Activations& x, F& y) {
    F u = w.d * combine_planes<P>(sums);
    if constexpr (S::mins) {
        I m = dot_mins<S::group>(w, x, 0);
        if constexpr (P == 2) m = (m << 8) + dot_mins<S::group>(w, x, 1);
        u = u - w.dmin * to_float(m);
    }
    y = y + x.d * u;
}

// The same of sums over scaled codes.
template <class S, int P>
FN void add_superblock(const Scales& w, int zero, I* sums, const Activations& x, F& y) {
    if constexpr (!S::mins)
#pragma GCC unroll 2
        for (int p = 0; p < P; ++p) sums[p] -= S::zero(zero) * dot_sums<S::group, true>(w.scales, x, p);
    add_sums<S, P>(w, sums, x, y);
}

// What will be read later, a line of memory with each vector of codes. A core drops a prefetch when
// it has as many lines under way as it can have; so each line is asked for twice.
template <class Format>
constexpr int superblock_bytes = SUPERBLOCK / Format::block * Format::bytes;

template <class Format>
FN void prefetch_line(const uint8_t* ahead, int i, U& codes, bool stream) {
    constexpr int lines = (LANES * superblock_bytes<Format> + 63) / 64, again = 16;
    if (i < lines) prefetch(ahead + 64 * i, codes, stream);
    if (i + 64 < lines) prefetch(ahead + 64 * (i + 64), codes, stream);  // more lines than vectors
    if (i >= again && i < again + lines) prefetch(ahead + 64 * (i - again), codes, stream);
}

// The rows' superblocks by 16 bytes, each block unpacked as soon as all of it is there: f(b, block).
template <class Format, class Use>
FN void each_block(Rows rows, Use&& f) {
    constexpr int bytes = superblock_bytes<Format>, blocks = SUPERBLOCK / Format::block;
    U words[(bytes + 15) / 16 * 4];
    int have = 0;
#pragma GCC unroll 8
    for (int b = 0; b < blocks; ++b) {
#pragma GCC unroll 4
        for (; have < Format::bytes * (b + 1); have += 16) {
            if (have + 16 <= bytes) {
                gather16(rows, have, words + have / 4);
            } else {  // what is left, without a byte behind it
                U last[4];
                gather16(rows, bytes - 16, last);
#pragma GCC unroll 4
                for (int j = 0; j < (bytes - have) / 4; ++j)
                    words[have / 4 + j] = last[4 - (bytes - have) / 4 + j];
            }
        }
        Block<Format> w;
        Format::unpack(InWords{words, b * Format::bytes}, w);
        f(b, w);
    }
}

template <class Format>
APART void unpack(const Quantised&, Rows rows, const uint8_t* ahead, bool stream, Tile& tile) {
    int n = 0;
    auto put = [&](int j, U codes) __attribute__((always_inline)) {
        prefetch_line<Format>(ahead, n++, codes, stream);
        tile.codes[j] = codes;
    };
    if constexpr (Format::block == SUPERBLOCK) {
        Scales w;
        Format::scales(rows, w);
#pragma GCC unroll 16
        for (int g = 0; g < SUPERBLOCK / Format::group; ++g) tile.scale[g] = sub_scale<Format>(w, g);
        tile.w = w;
        tile.d[0] = w.d;
        if (Format::mins) tile.dmin[0] = w.dmin;
        Format::codes(rows, put);
    } else {
        each_block<Format>(rows, [&](int b, Block<Format>& w) __attribute__((always_inline)) {
            tile.d[b] = w.d;
            if (Format::mins) tile.dmin[b] = w.dmin;
#pragma GCC unroll 32
            for (int j = 0; j < Format::block / 4; ++j) put(Format::block / 4 * b + j, w.codes[j]);
        });
    }
}

#ifndef ISOBIT_PAIRS
// Two vectors of codes made ready for dot_pair(), which multiplies both with T tokens' activations in
// P planes. reduce_lanes() ends a token's parts: then part[p] is plane p's.
template <int P>
FN void make_pair(U*) {}

template <int P, int T, class Part>
FN void dot_pair(Part (*part)[P], const U* codes, const Activations* const* x, int at) {
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j)
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t)
#pragma GCC unroll 2
            for (int p = 0; p < P; ++p)
                part[t][p] = dot(part[t][p], codes[j], broadcast(x[t]->plane[p] + at + 4 * j));
}

template <int P, class Part>
FN void reduce_lanes(Part*) {}
#endif

template <class S, int P, int T>
FN void add_tokens(const Tile& w, int zero, const Activations* const* x, F* y) {
    static_assert(S::steps % 2 == 0);
    I sums[T][P] = {};
    for (int j0 = 0; j0 < 64; j0 += S::steps) {
        typename S::Part part[T][P] = {};
#pragma GCC unroll 4
        for (int j = j0; j < j0 + S::steps; j += 2) dot_pair<P, T>(part, w.codes + j, x, 4 * j);
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) {
            reduce_lanes<P>(part[t]);
#pragma GCC unroll 2
            for (int p = 0; p < P; ++p)
                sums[t][p] = scale_add(sums[t][p], part[t][p], w.scale[4 * j0 / S::group]);
        }
    }
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) add_superblock<S, P>(w.w, zero, sums[t], *x[t], y[t]);
}

// u of block b of 32 values, of its sums over codes.
template <class S, int P>
FN F block_value(F d, F dmin, int zero, I* sums, const Activations& x, int b) {
    if constexpr (!S::mins)
#pragma GCC unroll 2
        for (int p = 0; p < P; ++p) sums[p] -= S::zero(zero) * x.sum32[p][b];
    F u = d * combine_planes<P>(sums);
    if constexpr (S::mins) {
        int m = x.sum32[0][b];
        if constexpr (P == 2) m = m * 256 + x.sum32[1][b];
        u = u - dmin * (float)m;
    }
    return u;
}

// The same of its sums over codes times whole activations, which as floats are what the planes' are.
template <int P>
FN F block_value(F d, I sum, const Activations& x, int b) {
    const int of_codes = P == 2 ? x.sum32[0][b] * 256 + x.sum32[1][b] : x.sum32[0][b];
    return d * to_float(sum - WIDE_ZERO * of_codes);
}

template <int P, int T>
FN void add_tokens_words(const Tile& w, const Activations* const* x, F* y) {
    F sum[T] = {};
    for (int b = 0; b < 8; ++b) {
        I sums[T] = {};
#pragma GCC unroll 8
        for (int j = 8 * b; j < 8 * (b + 1); ++j)
#pragma GCC unroll 4
            for (int t = 0; t < T; ++t) sums[t] = dot_words(sums[t], w.codes[j], x[t]->words + 4 * j);
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) sum[t] = sum[t] + block_value<P>(w.d[b], sums[t], *x[t], b);
    }
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) y[t] = y[t] + x[t]->d * sum[t];
}

template <class S, int P, int T>
FN void add_tokens_blocks(const Tile& w, int zero, const Activations* const* x, F* y) {
    constexpr int n = S::block / 4;
    static_assert(S::steps % 2 == 0 && S::block == 32);
    F sum[T] = {};
    for (int b = 0; b < SUPERBLOCK / S::block; ++b) {
        I sums[T][P] = {};
#pragma GCC unroll 4
        for (int j0 = n * b; j0 < n * (b + 1); j0 += S::steps) {
            typename S::Part part[T][P] = {};
#pragma GCC unroll 4
            for (int j = j0; j < j0 + S::steps; j += 2) dot_pair<P, T>(part, w.codes + j, x, 4 * j);
#pragma GCC unroll 4
            for (int t = 0; t < T; ++t) {
                reduce_lanes<P>(part[t]);
#pragma GCC unroll 2
                for (int p = 0; p < P; ++p) sums[t][p] += total(part[t][p]);
            }
        }
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t)
            sum[t] = sum[t] + block_value<S, P>(w.d[b], w.dmin[b], zero, sums[t], *x[t], b);
    }
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) y[t] = y[t] + x[t]->d * sum[t];
}

template <class S, int P, int T>
FN void add_some(const Tile& w, int zero, const Activations* const* x, F* y) {
    if constexpr (S::block == SUPERBLOCK)
        add_tokens<S, P, T>(w, zero, x, y);
    else if constexpr (S::words)
        add_tokens_words<P, T>(w, x, y);
    else
        add_tokens_blocks<S, P, T>(w, zero, x, y);
}

template <class S, int P>
APART void multiply(Tile& w, int zero, const Activations* const* x, int n, F* y) {
#pragma GCC unroll 32
    for (int j = 0; j < 64; j += 2) make_pair<P>(w.codes + j);
    int i = 0;
    for (; i + 4 <= n; i += 4) add_some<S, P, 4>(w, zero, x + i, y + i);
    for (; i + 2 <= n; i += 2) add_some<S, P, 2>(w, zero, x + i, y + i);
    if (i < n) add_some<S, P, 1>(w, zero, x + i, y + i);
}

}  // namespace isobit::ISOBIT_SIMD
