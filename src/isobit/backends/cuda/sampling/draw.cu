// Tokens drawn from rows of logits: section 10 of docs/numerics.md, a Draw of each row that one is wanted of. What is
// kept is found by a search for the bits of the least of it, ten at a time, in sums over all of those bits' values.
#include "draws.cuh"
#include "logprobs.cuh"

constexpr uint32 LEAST = 0x2b800000;  // 2^-40: below it weights are 0
constexpr int BINS = 1024;
constexpr int LEVELS = 5;  // of bins: of the first bits; of two more searches, for top_k and for top_p

// Where a search is: the bits found so far, and what lies above them.
struct Search {
    Sums above;
    uint64 target;
    uint32 prefix;
    int open;  // 0: there is nothing to search, or not enough
};
// What is kept: every p above `least`, and the first `equals` ids of those that are `least`.
struct Cut {
    uint64 equals;
    uint64 whole;  // the weights of all that is kept
    uint32 least;
};
// What one draw works with.
struct __align__(16) Scratch {  // its size is also known to sampler.py
    Sums bins[LEVELS][BINS];  // zero between draws
    Search search[LEVELS];
    Cut cut;
};
static_assert(sizeof(Scratch) == LEVELS * BINS * 16 + LEVELS * 32 + 32, "");

DEV uint64 high_product(uint64 a, uint64 b) { return __umul64hi(a, b); }

// Adds up values by bins in a block: 64 bits as two words, which 2,048 values cannot overflow.
struct Tally {
    int count[BINS];
    uint32 low[BINS], high[BINS];  // of 20 and 21 bits each
    DEV void clear() {
        for (int i = threadIdx.x; i < BINS; i += BLOCK) count[i] = 0, low[i] = high[i] = 0;
        __syncthreads();
    }
    DEV void add(int bin, uint32 p) {
        uint64 w = isobit::weight(p);
        atomicAdd(count + bin, 1);
        atomicAdd(low + bin, uint32(w) & 0xfffffu);
        atomicAdd(high + bin, uint32(w >> 20));
    }
    DEV void give(Sums* bins) {
        __syncthreads();
        for (int i = threadIdx.x; i < BINS; i += BLOCK)
            if (count[i]) {
                atomicAdd(&bins[i].count, uint64(count[i]));
                atomicAdd(&bins[i].weight, uint64(low[i]) + (uint64(high[i]) << 20));
            }
    }
};

// A search a level further: the highest bin up to and with which the measure reaches the target. Every thread gets it.
DEV Search narrowed(Search s, const Sums* bins, bool counted, Sums* buffer, Search* found) {
    constexpr int OWN = BINS / BLOCK;
    Sums own[OWN], sum = {0, 0};
    for (int i = 0; i < OWN; i++) {  // from the highest bin down
        own[i] = bins[BINS - 1 - (threadIdx.x * OWN + i)];
        sum = plus(sum, own[i]);
    }
    if (threadIdx.x == 0) *found = {{0, 0}, 0, 0, 0};
    Sums above = plus(s.above, block_before(sum, buffer));
    for (int i = 0; i < OWN; i++) {
        Sums upto = plus(above, own[i]);
        uint64 before = counted ? above.count : above.weight, now = counted ? upto.count : upto.weight;
        if (s.open && before < s.target && now >= s.target)
            *found = {above, s.target, s.prefix << 10 | uint32(BINS - 1 - (threadIdx.x * OWN + i)), 1};
        above = upto;
    }
    __syncthreads();
    Search next = *found;
    __syncthreads();
    return next;
}

// The end of a search.
DEV Cut cut_of(Search s, bool counted, uint64 whole) {
    if (!s.open) return {0, whole, 0};
    uint64 each = counted ? 1 : isobit::weight(s.prefix);
    uint64 left = s.target - (counted ? s.above.count : s.above.weight), equals = (left + each - 1) / each;
    return {equals, s.above.weight + equals * isobit::weight(s.prefix), s.prefix};
}

DEV uint64 sum_of_all(const Sums* pieces, int n, Sums* buffer) {
    Sums sum = {0, 0};
    for (int i = threadIdx.x; i < n; i += BLOCK) sum = plus(sum, pieces[i]);
    return block_sum(sum, buffer).weight;
}

// A block for each piece of each draw. p: the bits of each value's probability relative to the largest; pieces: the
// sums of weights of each piece. keys: of the largest logits, k of a row. filtered: whether some draw keeps not all.
// edited: whether logits and keys are of draws, not of rows; logits may then be where p goes.
KERNEL(256) weigh_draws(const Draw* draws, const float* logits, int n, const uint64* keys, int k, int edited,
                        uint32* p, Sums* pieces, Scratch* scratch, int filtered) {
    begin();
    __shared__ Sums buffer[WARPS];
    __shared__ Tally tally;
    const Draw draw = draws[blockIdx.y];
    const int row = edited ? blockIdx.y : draw.row;
    const uint64 key = keys[int64(row) * k];
    const float* z = logits + int64(row) * n;
    const bool weighs = chooses(key) && draw.temperature > 0.0f;
    const float most = value_of(key);
    if (filtered) tally.clear();
    Sums sum = {0, 0};
    for (int j = 0; j < EACH; j++) {
        int i = blockIdx.x * PIECE + j * BLOCK + threadIdx.x;
        if (i >= n || !weighs) continue;
        uint32 b = bits(isobit::exp_of_negative(div(sub(z[i], most), draw.temperature)));
        p[int64(blockIdx.y) * n + i] = b;
        sum.weight += isobit::weight(b);
        if (filtered && b >= LEAST) tally.add(b >> 20, b);
    }
    sum = block_sum(sum, buffer);
    if (threadIdx.x == 0) pieces[int64(blockIdx.y) * gridDim.x + blockIdx.x] = sum;
    if (filtered) tally.give(scratch[blockIdx.y].bins[0]);
}

// Sums over the next ten bits of the values that begin as the search says. Levels 1 and 2 search for top_k, 3 and 4
// for top_p; `counts`: whether some draw has a top_k.
KERNEL(256) narrow(const Draw* draws, int n, const uint32* p, const Sums* pieces, Scratch* scratch, int level,
                   int counts) {
    begin();
    __shared__ Sums buffer[WARPS], other[WARPS];
    __shared__ Tally tally;
    __shared__ Search found;
    const Draw draw = draws[blockIdx.y];
    Scratch& at = scratch[blockIdx.y];
    const bool counted = level < 3;
    if (counted ? !draw.top_k : !draw.top_p) return;
    Search s = {{0, 0}, 0, 0, 1};
    if (level == 1) s.target = draw.top_k;
    if (level == 3) {
        uint64 whole = sum_of_all(pieces + int64(blockIdx.y) * gridDim.x, gridDim.x, other);
        if (counts && draw.top_k) {
            Cut cut = cut_of(narrowed(at.search[2], at.bins[2], true, buffer, &found), true, whole);
            whole = cut.whole;
        }
        s.target = max(high_product(draw.top_p, whole), uint64(1));
    }
    const bool first = level == 1 || level == 3;
    s = narrowed(first ? s : at.search[level - 1], at.bins[first ? 0 : level - 1], counted, buffer, &found);
    if (threadIdx.x == 0 && blockIdx.x == 0) at.search[level] = s;
    tally.clear();
    const int shift = first ? 10 : 0;
    for (int j = 0; j < EACH; j++) {
        int i = blockIdx.x * PIECE + j * BLOCK + threadIdx.x;
        uint32 b = i < n ? p[int64(blockIdx.y) * n + i] : 0u;
        if (s.open && b >= LEAST && b >> shift >> 10 == s.prefix) tally.add(b >> shift & 1023u, b);
    }
    tally.give(at.bins[level]);
}

// What is kept of each piece: the weights of what is above the cut, and how many are it.
KERNEL(256) keep(const Draw* draws, int n, const uint32* p, Sums* pieces, Scratch* scratch) {
    begin();
    __shared__ Sums buffer[WARPS], other[WARPS];
    __shared__ Search found;
    const Draw draw = draws[blockIdx.y];
    Scratch& at = scratch[blockIdx.y];
    Cut cut = {0, 0, 0};
    if (draw.top_p || draw.top_k) {
        const int level = draw.top_p ? 4 : 2;
        cut = cut_of(narrowed(at.search[level], at.bins[level], !draw.top_p, buffer, &found), !draw.top_p, 0);
    }
    if (draw.min_p > cut.least) cut = {~0ull, 0, draw.min_p};
    Sums sum = {0, 0};
    if (draw.temperature > 0.0f)
        for (int j = 0; j < EACH; j++) {
            int i = blockIdx.x * PIECE + j * BLOCK + threadIdx.x;
            uint32 b = i < n ? p[int64(blockIdx.y) * n + i] : 0u;
            if (b > cut.least) sum.weight += isobit::weight(b);
            if (b == cut.least && i < n) sum.count++;
        }
    sum = block_sum(sum, other);
    if (threadIdx.x == 0) pieces[int64(blockIdx.y) * gridDim.x + blockIdx.x] = sum;
    if (threadIdx.x == 0 && blockIdx.x == 0) at.cut = cut;
}

// Word 0 of Philox 4x64 with 10 rounds, key (seed, 0), counter (index, 0, 0, 0).
DEV uint64 random_bits(uint64 seed, uint64 index) {
    uint64 c0 = index, c1 = 0, c2 = 0, c3 = 0, k0 = seed, k1 = 0;
    for (int round = 0; round < 10; round++) {
        uint64 a = 0xD2E7470EE14C6C93ull, b = 0xCA5A826395121157ull;
        uint64 n0 = high_product(b, c2) ^ c1 ^ k0, n2 = high_product(a, c0) ^ c3 ^ k1;
        c1 = b * c2, c3 = a * c0, c0 = n0, c2 = n2;
        k0 += 0x9E3779B97F4A7C15ull, k1 += 0xBB67AE8584CAA73Bull;
    }
    return c0;
}

// A draw a block: its token, into word `at` of its row of `found` and, if there are any, the tokens of the next step,
// whose last row is repeated up to `repeated` rows.
KERNEL(256) draw(const Draw* draws, int n, const uint64* keys, int k, int edited, const uint32* p, const Sums* pieces,
                 int n_pieces, Scratch* scratch, int filtered, int* found, int at, int width, int* tokens, int rows,
                 int repeated) {
    begin();
    __shared__ Sums buffer[4][WARPS];
    __shared__ uint64 rest, equals;  // behind the pieces before the one with the token
    __shared__ int piece, token;
    const Draw one = draws[blockIdx.x];
    Scratch& mine = scratch[blockIdx.x];
    const uint64 key = keys[int64(edited ? blockIdx.x : one.row) * k];
    const Cut cut = filtered ? mine.cut : Cut{0, 0, 0};
    const uint64 each = isobit::weight(cut.least);
    if (threadIdx.x == 0) token = key == BROKEN ? -1 : key ? index_of(key) : -2, piece = -1;
    // A thread has some pieces, one after the other.
    const Sums* row = pieces + int64(blockIdx.x) * n_pieces;
    const int own = (n_pieces + BLOCK - 1) / BLOCK;
    const int first = min(int(threadIdx.x) * own, n_pieces), last = min(first + own, n_pieces);
    Sums sum = {0, 0};
    for (int i = first; i < last; i++) sum.count += row[i].count;
    uint64 left = cut.equals - min(cut.equals, block_before(sum, buffer[0]).count), now = left;
    auto kept = [&](Sums s) {
        uint64 equal = min(now, s.count);
        now -= equal;
        return s.weight + equal * each;
    };
    sum = {0, 0};
    for (int i = first; i < last; i++) sum.weight += kept(row[i]);
    const uint64 whole = block_sum(sum, buffer[1]).weight;
    uint64 u = high_product(random_bits(one.seed, one.index), whole);
    uint64 before = block_before(sum, buffer[2]).weight;
    const bool draws_one = chooses(key) && one.temperature > 0.0f;
    if (draws_one && u >= before && u - before < sum.weight) {
        u -= before, now = left;
        for (int i = first; i < last; i++) {
            uint64 had = now, w = kept(row[i]);
            if (u < w) {
                piece = i, rest = u, equals = had;
                break;
            }
            u -= w;
        }
    }
    __syncthreads();
    if (piece >= 0) {  // in it a thread has values that follow one another
        uint32 b[EACH];
        sum = {0, 0};
        const int begins = piece * PIECE + threadIdx.x * EACH;
        for (int j = 0; j < EACH; j++) {
            b[j] = begins + j < n ? p[int64(blockIdx.x) * n + begins + j] : 0u;
            if (b[j] > cut.least) sum.weight += isobit::weight(b[j]);
            if (b[j] == cut.least && begins + j < n) sum.count++;
        }
        // Equals are kept in order, so what is kept before a thread follows from both sums before it.
        Sums ahead = block_before(sum, buffer[3]);
        uint64 taken = min(equals, ahead.count), sofar = ahead.weight + taken * each;
        for (int j = 0; j < EACH; j++) {
            bool equal = b[j] == cut.least && taken < equals;
            uint64 w = b[j] > cut.least ? isobit::weight(b[j]) : equal ? each : 0;
            taken += equal;
            if (rest >= sofar && rest - sofar < w) token = begins + j;
            sofar += w;
        }
    }
    __syncthreads();
    if (filtered) {
        int4* bins = reinterpret_cast<int4*>(mine.bins);
        for (int i = threadIdx.x; i < LEVELS * BINS; i += BLOCK) bins[i] = make_int4(0, 0, 0, 0);
    }
    if (threadIdx.x == 0) {
        found[int64(one.row) * width + at] = token;
        const int end = one.row == rows - 1 ? repeated : one.row + 1;
        for (int i = one.row; tokens && token >= 0 && i < end; i++) tokens[i] = token;
    }
}
