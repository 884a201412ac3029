// attention: in: queries in their quantised form; out: [tokens, heads * head_dim]; integers: the cache,
// query heads, the window (0: all positions); vectors: each head's sink, if there are any.
//
// Up to QUERY_BLOCK query vectors of one key-value head share each load of keys and values; keys, then
// channels, lie in the lanes.

#include "../engine/simd_op.h"

#ifndef ISOBIT_LEVEL
#include <algorithm>
#endif

#include "../engine/attention.h"

#ifdef ISOBIT_LEVEL

namespace isobit::ISOBIT_SIMD {

// Where channel or dim i of position `slot` lies in a page's k and v.
FN size_t k_index(const PageLayout& p, int slot, int i) {
    return (((size_t)(slot / 16) * (p.padded / 2) + i / 2) * 16 + slot % 16) * 2 + i % 2;
}
FN size_t v_index(int slot, int i) {
    return (((size_t)(i / 16) * (KV_PAGE / 2) + slot / 2) * 16 + i % 16) * 2 + slot % 2;
}

// The dot products of N queries (pairs of 16-bit integers, q[n] a pair each step) with one vector
// of pairs a step, high and low bytes apart: f(H) * 256 + f(L) in out[n].
template <int N>
FN void dot_planes(const int16_t* pairs, int stride, const int16_t* const* q, int steps, F* out) {
    I high[N] = {}, low[N] = {};
    for (int i = 0; i < steps; ++i) {
        H v = (H)load(pairs + (size_t)i * stride);
        H hi = (v + (H)(0x00800080u + U{})) >> 8;
        H lo = v - (hi << 8);
        for (int n = 0; n < N; ++n) {
            U x = broadcast(q[n] + 2 * i);
            high[n] = add_pairs(high[n], (U)hi, x);
            low[n] = add_pairs(low[n], (U)lo, x);
        }
    }
    for (int n = 0; n < N; ++n)
        out[n] = to_float(high[n]) * 256.0f + to_float(low[n]);
}

struct Softmax {
    float m, l;
    float o[MAX_HEAD_DIM];
};

// Scores to integers P over a tile's keys begin ... end - 1: sets m_t, l_t, and g, the scale of P.
FN void weigh(const float* s, const float* dv, int begin, int end, float* m, float* l, int16_t* P,
              float* g) {
    float top = s[begin];
    for (int j = begin + 1; j < end; ++j) top = s[j] > top ? s[j] : top;
    float p[KV_PAGE] = {}, weighted[KV_PAGE] = {};
    for (int j = begin; j < end; ++j) p[j] = isobit::exp(s[j] - top);
    for (int j = begin; j < end; ++j) weighted[j] = p[j] * dv[j];
    *m = top;
    *g = quantise_block(weighted, KV_PAGE, 2, P);
    *l = Lanes256::tree64(p);
}

FN void merge(Softmax& a, float m, float l, const float* o, int n, bool first) {
    if (first) {
        a.m = m;
        a.l = l;
        memcpy(a.o, o, n * sizeof(float));
        return;
    }
    float top = m > a.m ? m : a.m;
    float x = isobit::exp(a.m - top), y = isobit::exp(m - top);
    a.l = a.l * x + l * y;
    for (int i = 0; i < n; ++i) a.o[i] = a.o[i] * x + o[i] * y;
    a.m = top;
}

FN void merge_sink(Softmax& a, float sink, int n) {
    const float top = sink > a.m ? sink : a.m;
    const float x = isobit::exp(a.m - top);
    a.l = a.l * x + isobit::exp(sink - top);
    for (int i = 0; i < n; ++i) a.o[i] = a.o[i] * x;
}

template <int N>
void attend(const PageLayout& layout, const Pages& pages, const Query* queries) {
    Softmax state[N];
    int first = queries[0].first, last = 0;
    const int16_t* q[N];
    for (int n = 0; n < N; ++n) {
        q[n] = queries[n].q;
        if (queries[n].first < first) first = queries[n].first;
        if (queries[n].position > last) last = queries[n].position;
    }
    const int steps = (layout.head_dim + 1) / 2;
    for (int t = first / KV_PAGE; t <= last / KV_PAGE; ++t) {
        uint8_t* page = pages.base + pages.table[t] * pages.stride;
        const int present = last - t * KV_PAGE + 1 < KV_PAGE ? last - t * KV_PAGE + 1 : KV_PAGE;
        alignas(64) float s[N][KV_PAGE];
        for (int j = 0; j < present; j += LANES) {
            F dots[N], dk = (F)load(page_dk(page) + j);
            dot_planes<N>(page_k(page) + k_index(layout, j, 0), 32, q, steps, dots);
            for (int n = 0; n < N; ++n) {
                F x = (queries[n].d * dk) * dots[n];
                memcpy(s[n] + j, &x, sizeof x);
            }
        }
        int16_t P[N][KV_PAGE];
        const int16_t* weights[N];
        float m[N] = {}, l[N] = {}, g[N] = {};
        for (int n = 0; n < N; ++n) {
            int begin = queries[n].first - t * KV_PAGE, end = queries[n].position - t * KV_PAGE + 1;
            begin = begin > 0 ? begin : 0;
            end = end < KV_PAGE ? end : KV_PAGE;
            weights[n] = P[n];
            if (begin < end)
                weigh(s[n], page_dv(page), begin, end, &m[n], &l[n], P[n], &g[n]);
            else
                memset(P[n], 0, sizeof P[n]);
        }
        alignas(64) float o[N][MAX_HEAD_DIM];
        for (int c = 0; c < layout.padded; c += LANES) {
            F dots[N];
            dot_planes<N>(page_v(layout, page) + v_index(0, c), 32, weights, (present + 1) / 2,
                          dots);
            for (int n = 0; n < N; ++n) {
                F x = g[n] * dots[n];
                memcpy(o[n] + c, &x, sizeof x);
            }
        }
        for (int n = 0; n < N; ++n)
            if (queries[n].position / KV_PAGE >= t && queries[n].first / KV_PAGE <= t)
                merge(state[n], m[n], l[n], o[n], layout.head_dim, t == queries[n].first / KV_PAGE);
    }
    for (int n = 0; n < N; ++n) {
        if (queries[n].sink) merge_sink(state[n], *queries[n].sink, layout.head_dim);
        float r = 1.0f / state[n].l;
        for (int i = 0; i < layout.head_dim; ++i) queries[n].out[i] = state[n].o[i] * r;
    }
}

}  // namespace isobit::ISOBIT_SIMD

namespace isobit {

template <>
void Store<LEVEL>::run(const PageLayout& p, uint8_t* page, int slot, const int16_t* k, float dk,
                       const int16_t* v, float dv) {
    page_dk(page)[slot] = dk;
    page_dv(page)[slot] = dv;
    for (int i = 0; i < p.head_dim; ++i) {
        page_k(page)[k_index(p, slot, i)] = k[i];
        page_v(p, page)[v_index(slot, i)] = v[i];
    }
}

template <>
void Attend<LEVEL>::run(const PageLayout& layout, const Pages& pages, const Query* queries, int n) {
    for (; n >= 4; n -= 4, queries += 4) attend<4>(layout, pages, queries);
    for (; n >= 2; n -= 2, queries += 2) attend<2>(layout, pages, queries);
    if (n) attend<1>(layout, pages, queries);
}

}  // namespace isobit

#else

namespace isobit {

// A work item is QUERY_BLOCK query vectors of one key-value head and one sequence: the heads of its
// group for one token, then for the next.
static void attention(const Phase& phase, Pass& pass, int) {
    const Op& op = phase.op;
    const Batch& b = pass.batch;
    const Cache& cache = pass.cache(op.integers[0]);
    const int H = op.integers[1], G = cache.heads, T = b.n_tokens, group = H / G;
    const int D = cache.layout.head_dim, padded = cache.layout.padded;
    const int window = op.integers[2];
    const float* sinks = op.vectors.empty() ? nullptr : op.vectors[0];
    const Slot& q = pass.slot(op.in[0]);
    auto blocks = [&](int tokens) {
        return (tokens * group + QUERY_BLOCK - 1) / QUERY_BLOCK * G;
    };
    auto end_of = [&](int t) {
        int end = t;
        while (end < T && b.sequence[end] == b.sequence[t]) ++end;
        return end;
    };
    int items = 0;
    for (int t = 0; t < T; t = end_of(t)) items += blocks(end_of(t) - t);
    pass.team.parallel_for(items, [&](int i) {
        int first = 0, end = end_of(0);
        for (; i >= blocks(end - first); first = end, end = end_of(first))
            i -= blocks(end - first);
        const int g = i % G, n = (end - first) * group;
        Query queries[QUERY_BLOCK];
        int count = 0;
        for (int j = i / G * QUERY_BLOCK; j < n && count < QUERY_BLOCK; ++j) {
            const int t = first + j / group, h = g * group + j % group;
            const size_t at = (size_t)t * H + h;
            const int position = b.positions[t], beyond = window ? position - window + 1 : 0;
            queries[count++] = {&q.query[at * padded], q.query_scale[at], std::max(beyond, 0),
                                position, sinks ? sinks + h : nullptr,
                                pass.at(op.out[0], 0, t, 0) + h * D};
        }
        const Pages pages = {pass.page(cache, 0, g), G * cache.layout.bytes,
                             b.pages + (size_t)b.sequence[first] * b.pages_per_sequence};
        run_of<Attend>(pass.kernels)(cache.layout, pages, queries, count);
    });
}

static const PhaseKind kind("attention", attention);

}  // namespace isobit

#endif
