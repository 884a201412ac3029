// What the kernels of a fused layer of one token, or of ROWS tokens, share: norm and quantisation.
//
// Shapes are compile-time constants: HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN, EXPERTS, USED. Of several
// rows each has the sums of one row alone, in the same order; what they share (Share) are reads of weights.
//
// Of a split model a part has some heads, some columns of SwiGLU, and MADE of the rows of products that are added
// to x: each adds these, in its own x, and sends the sums. Who reads x as a whole gets the others' (whole_rows).
#pragma once
#include "step.cuh"
#include "exchange.cuh"

#ifndef ROWS
#define ROWS 1
#endif

#ifndef MADE
#define MADE HIDDEN
#endif

constexpr int BLOCK = 512, WARPS = BLOCK / WARP;
constexpr int HIDDEN_SUPERS = HIDDEN / SUPER, FFN_SUPERS = FFN / SUPER;
constexpr int HEADS_SUPERS = HEADS * HEAD_DIM / SUPER;

// The factor of a row's RMS norm (section 5), by each warp. squares: the sums of squares of its columns, shared, SUPER.
DEV float norm_factor(const float* squares, float eps) {
    return div(1.0f, square_root(add(mean_of<HIDDEN>(buffer_tree(squares)), eps)));
}

// RMS norm of x, [ROWS][HIDDEN]. Half a block adds up the squares of a row, a column a thread; each superblock is normed
// by one warp. Of one row, the first half and the second half's warps first. Of several, a half takes every other row.
struct Norm {
    static constexpr int SUPERS = ROWS * HIDDEN_SUPERS, EACH = (SUPERS + WARPS - 1) / WARPS;
    static constexpr int ADDED = (ROWS + 1) / 2;  // rows of a half
    float weight[EACH][8];                        // fetched ahead
    const float *column, *values;                 // of x: a thread's first column; a lane's part of its first superblock

    DEV static int super(int i) {
        return (ROWS == 1 ? (warp_id() + WARPS / 2) % WARPS : warp_id()) + i * WARPS;
    }
    DEV static int added(int i) { return threadIdx.x / SUPER + i * (BLOCK / SUPER); }  // a row
    DEV Norm(const float* norm) {
#pragma unroll
        for (int i = 0; i < EACH; i++)
            if (super(i) < SUPERS) load_super(norm + super(i) % HIDDEN_SUPERS * SUPER, weight[i]);
    }
    // Where x is, which quantise() reads.
    DEV void find(const float* x) {
        column = at_hand(x + added(0) * HIDDEN + threadIdx.x % SUPER);
        values = at_hand(x + super(0) * SUPER + 8 * lane_id());
    }
    // The whole of x quantised, to shared memory. buffer: shared, ROWS * SUPER. A barrier must follow.
    DEV void quantise(float eps, float* buffer, ActivationBlock* acts) {
        float v[EACH][8], columns[ADDED][HIDDEN_SUPERS];
        int at = threadIdx.x % SUPER;
#pragma unroll
        for (int n = 0; n < ADDED; n++)
            if (added(n) < ROWS)
#pragma unroll
                for (int i = 0; i < HIDDEN_SUPERS; i++) columns[n][i] = column[(added(n) - added(0)) * HIDDEN + i * SUPER];
#pragma unroll
        for (int i = 0; i < EACH; i++)
            if (super(i) < SUPERS) load8(values + i * WARPS * SUPER, v[i]);
#pragma unroll
        for (int n = 0; n < ADDED; n++) {
            if (added(n) >= ROWS) continue;
            float sum = 0.0f;
#pragma unroll
            for (int i = 0; i < HIDDEN_SUPERS; i++) sum = add(sum, mul(columns[n][i], columns[n][i]));
            buffer[added(n) * SUPER + at] = sum;
        }
        __syncthreads();
        float r = ROWS == 1 ? norm_factor(buffer, eps) : 0.0f;
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            if (super(i) >= SUPERS) continue;
            if (ROWS > 1) r = norm_factor(buffer + super(i) / HIDDEN_SUPERS * SUPER, eps);
#pragma unroll
            for (int k = 0; k < 8; k++) v[i][k] = mul(mul(v[i][k], r), weight[i][k]);
            quantise_without_digits(v[i], acts + super(i));
        }
    }
};

// Where a lane's values of its first superblock are, of vectors of SUPERS from number `first` of those in x on.
template <int SUPERS>
DEV const float* first_values(const float* x, int first) {
    return at_hand(x + (first * SUPERS + warp_id()) * SUPER + 8 * lane_id());
}
// Vectors of so many superblocks from number `first` of those in x on, one behind the other, to acts (shared), by the
// first BY warps, two superblocks a warp at a time: both are asked for before either is waited for. own: first_values.
// finish(s, values): by a warp, on superblock s, before it is quantised. A barrier must follow.
template <int SUPERS, int BY = WARPS, class Finish>
DEV void quantise_vectors(const float* x, const float* own, int first, int vectors, const Exchange<Cut>& exchange,
                          ActivationBlock* acts, Finish finish) {
    for (int s = warp_id(); warp_id() < BY && s < vectors * SUPERS; s += 2 * BY) {
        float v[2][8];
        int n = s + BY < vectors * SUPERS ? 2 : 1;
#ifdef BOUNDS
        Exchange<Cut>::Asked asked[2];
#pragma unroll
        for (int i = 0, at = s; i < 2; i++, at += BY)
            if (i < n) {
                int vector = first + at / SUPERS;
                exchange.ask_super(x + vector * exchange.columns, vector, at % SUPERS, asked[i], v[i]);
            }
#pragma unroll
        for (int i = 0, at = s; i < 2; i++, at += BY)
            if (i < n) exchange.take_super(first + at / SUPERS, at % SUPERS, asked[i], v[i]);
#else
#pragma unroll
        for (int i = 0; i < 2; i++)
            if (i < n) load8(own + (s - warp_id() + i * BY) * SUPER, v[i]);
#endif
#pragma unroll
        for (int i = 0; i < 2; i++) {
            if (i >= n) continue;
            finish(s + i * BY, v[i]);
            quantise_without_digits(v[i], acts + s + i * BY);
        }
    }
}

template <int SUPERS, int BY = WARPS>
DEV void quantise_vectors(const float* x, const float* own, int first, int vectors, const Exchange<Cut>& exchange,
                          ActivationBlock* acts) {
    quantise_vectors<SUPERS, BY>(x, own, first, vectors, exchange, acts, [](int, float (&)[8]) {});
}

// N rows of x, [ROWS][HIDDEN], from row `first` on, as a whole for this block: of a split model in `whole` (shared), and
// if they are to be kept, in x.
#ifdef BOUNDS
template <int N>
struct WholeRows {
    float x[N * HIDDEN];
};
template <int N>
DEV const float* whole_rows(const Exchange<Cut>& exchange, float* x, int first, WholeRows<N>& whole, bool keep) {
    constexpr int EACH = (N * HIDDEN + BLOCK - 1) / BLOCK;
    auto part_of = [](int i) { return Cut::part_of(i % HIDDEN); };
    int from = first * HIDDEN;
    uint64 word[EACH];  // all are asked for at once, also what this part has: no branch stands between
    float own[EACH];
#pragma unroll
    for (int k = 0; k < EACH; k++) {
        int i = min(k * BLOCK + int(threadIdx.x), N * HIDDEN - 1);
        word[k] = read_word(exchange.mine + from + i), own[k] = x[from + i];
    }
#pragma unroll
    for (int k = 0; k < EACH; k++) {
        int i = k * BLOCK + threadIdx.x;
        if (i >= N * HIDDEN) continue;
        float v = part_of(i) == exchange.rank ? own[k] : exchange.value(word[k], part_of(i), from + i);
        whole.x[i] = v;
        if (keep && part_of(i) != exchange.rank) x[from + i] = v;
    }
    __syncthreads();
    return whole.x;
}
#else
template <int N>
struct WholeRows {};
template <int N>
DEV const float* whole_rows(const Exchange<Cut>&, float* x, int first, WholeRows<N>&, bool) {
    return x + first * HIDDEN;
}
#endif

// How many of n things, dealt one by one to the blocks of the grid, are this block's.
DEV int dealt(int n) { return (n - int(blockIdx.x) + int(gridDim.x) - 1) / int(gridDim.x); }

// What a block has behind attention. Rows that chose different experts share no weights, so with experts a block
// is one row's; else it has all of them.
constexpr int ROWS_EACH = EXPERTS ? 1 : ROWS;
struct Share {
    int row, block, blocks;  // the first of its rows; which block of how many with the same
    DEV Share() {
        constexpr int APART = ROWS / ROWS_EACH;  // with all rows in a block the first is 0
        row = blockIdx.x % APART, block = blockIdx.x / APART, blocks = (int(gridDim.x) - row + APART - 1) / APART;
    }
    // See dealt.
    DEV int dealt(int n) const { return (n - block + blocks - 1) / blocks; }
    // Where value i lies, [ROWS][HIDDEN], of those that it makes: 8 outputs of each of n groups, of its rows in turn.
    DEV int place(int i, int n) const {
        int group = i / 8, r = ROWS_EACH == 1 ? 0 : group / n;
        return (row + r) * HIDDEN + (block + (group - r * n) * blocks) * 8 + i % 8;
    }
};
