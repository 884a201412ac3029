#include "forward.h"

#include <sys/mman.h>

#include <algorithm>
#include <new>

namespace isobit {

LazyMemory::LazyMemory(size_t bytes) : bytes_(bytes) {
    int flags = MAP_PRIVATE | MAP_ANONYMOUS;
#ifdef MAP_NORESERVE
    flags |= MAP_NORESERVE;
#endif
    void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    data_ = (uint8_t*)p;
}

LazyMemory::~LazyMemory() { munmap(data_, bytes_); }

Engine::Engine(const Config& config, std::vector<Layer> layers, const Matrix& embedding,
               const float* output_norm, const Matrix& output, const Kernels& kernels, int threads)
    : c_(config),
      layers_(std::move(layers)),
      embedding_(embedding),
      output_(output),
      output_norm_(output_norm),
      kernels_(kernels),
      layout_(page_layout(config.head_dim)),
      cache_(layers_.size() * config.pages * config.n_kv_heads * layout_.bytes),
      team_(threads) {}

uint8_t* Engine::page(int layer, int page, int head) const {
    return cache_.data() +
           (((size_t)layer * c_.pages + page) * c_.n_kv_heads + head) * layout_.bytes;
}

// One pass: every thread of the team runs all of it, meeting the others after each step.
struct Engine::Pass {
    Engine& e;
    const Batch& b;
    float* logits;
    Tap* tap;
    const std::function<bool()>& stop;
    bool stopped = false;
    const Config& c = e.c_;
    const Kernels& kernels = e.kernels_;
    Team& team = e.team_;
    const int T = b.n_tokens;

    void prepare() {
        auto grow = [](auto& v, size_t n) {
            if (v.size() < n) v.resize(n);
        };
        const size_t t = T;
        grow(e.x_, t * c.hidden);
        grow(e.sum_, t * c.hidden);
        grow(e.qkv_, t * c.qkv());
        grow(e.q_, t * c.n_heads * c.head_dim);
        grow(e.k_, t * c.n_kv_heads * c.head_dim);
        grow(e.dq_, t * c.n_heads);
        grow(e.q_int_, t * c.n_heads * e.layout_.padded);
        e.normed_.resize(T, c.hidden);
        e.attention_.resize(T, c.n_heads * c.head_dim);
        e.final_.resize(std::max(b.n_logit_rows, 1), c.hidden);
        if (c.moe()) {
            grow(e.router_, t * c.n_experts);
            grow(e.probabilities_, t * c.n_experts);
            grow(e.weights_, t * c.n_experts_used);
            grow(e.ids_, t * c.n_experts_used);
        }
        const int k = c.moe() ? c.n_experts_used : 1;
        e.experts_.resize(T, k, c.ffn, c.hidden);
        if (!c.moe()) {
            e.ids_.assign(T, 0);
            e.experts_.group(e.ids_.data(), 1);
        }
    }

    template <class V>
    void show(int thread, const char* stage, int layer, const V* data,
              std::initializer_list<int> shape) {
        if (!tap || !tap->wants(stage)) return;
        if (thread == 0) tap->take(stage, layer, data, shape);
        team.barrier();
    }

    void run(int thread) {
        team.each(T, [&](int t) {
            kernels.dequantise(e.embedding_.type,
                               e.embedding_.data + b.tokens[t] * e.embedding_.row_bytes, c.hidden,
                               row(e.x_, t));
            normalise(t, e.layers_[0].attn_norm);
        });
        show(thread, "embedding", -1, e.x_.data(), {T, c.hidden});
        for (int l = 0; l < (int)e.layers_.size(); ++l) {
            if (stop) {
                if (thread == 0) stopped = stop();
                team.barrier();
                if (stopped) return;
            }
            attention(thread, l);
            feed_forward(thread, l);
        }
        finish(thread);
    }

    float* row(std::vector<float>& values, int t) { return &values[(size_t)t * c.hidden]; }

    void normalise(int t, const float* weight) {
        kernels.rms_norm(row(e.x_, t), weight, c.hidden, c.eps, e.normed_.row(t));
        e.normed_.quantise(kernels, t, c.planes);
    }

    // Token t's residual, and the norm before what comes next.
    void add_residual(int t, const float* y, const float* next_norm) {
        kernels.add(row(e.x_, t), y, c.hidden, row(e.x_, t));
        if (next_norm) normalise(t, next_norm);
    }

    void attention(int thread, int l) {
        const Layer& w = e.layers_[l];
        const int D = c.head_dim, H = c.n_heads, G = c.n_kv_heads, width = c.qkv();
        show(thread, "attn_norm", l, e.normed_.values.data(), {T, c.hidden});
        float* qkv = e.qkv_.data();
        const Job jobs[] = {
            job(kernels, c.planes, w.q, e.normed_, T, qkv, width),
            job(kernels, c.planes, w.k, e.normed_, T, qkv + H * D, width),
            job(kernels, c.planes, w.v, e.normed_, T, qkv + (H + G) * D, width),
        };
        multiply(team, jobs, 3);
        show(thread, "qkv_matmul", l, qkv, {T, width});
        // Four heads at a time: first the query heads, then the key-value heads.
        const int q_steps = (H + 3) / 4, kv_steps = (G + 3) / 4;
        team.each(T * (q_steps + kv_steps), [&](int i) {
            const int t = i / (q_steps + kv_steps), step = i % (q_steps + kv_steps);
            if (step < q_steps)
                for (int h = 4 * step; h < std::min(4 * step + 4, H); ++h) query(w, t, h);
            else
                for (int g = 4 * (step - q_steps); g < std::min(4 * (step - q_steps) + 4, G); ++g)
                    key_value(w, l, t, g);
        });
        show(thread, "q_post_rope", l, e.q_.data(), {T, H, D});
        show(thread, "k_post_rope", l, e.k_.data(), {T, G, D});
        attend(l);
        show(thread, "attention", l, e.attention_.values.data(), {T, H * D});
        team.each(T, [&](int t) { e.attention_.quantise(kernels, t, c.planes); });
        const Job out = job(kernels, c.planes, w.attn_output, e.attention_, T, e.sum_.data(),
                            c.hidden);
        multiply(team, &out, 1);
        show(thread, "attn_out", l, e.sum_.data(), {T, c.hidden});
        team.each(T, [&](int t) { add_residual(t, row(e.sum_, t), w.ffn_norm); });
        show(thread, "post_attn_residual", l, e.x_.data(), {T, c.hidden});
    }

    // Head norm and RoPE of one head vector.
    void turn(const float* x, const float* weight, int t, float* y) {
        const int half = c.head_dim / 2;
        float normed[MAX_HEAD_DIM];
        kernels.rms_norm(x, weight, c.head_dim, c.eps, normed);
        kernels.rope(normed, b.cos + (size_t)t * half, b.sin + (size_t)t * half, c.head_dim, y);
    }

    void query(const Layer& w, int t, int h) {
        const int D = c.head_dim;
        const size_t at = (size_t)t * c.n_heads + h;
        turn(&e.qkv_[(size_t)t * c.qkv() + h * D], w.q_norm, t, &e.q_[at * D]);
        kernels.quantise_head(&e.q_[at * D], D, &e.q_int_[at * e.layout_.padded], &e.dq_[at]);
        e.dq_[at] = e.dq_[at] * c.attention_scale;
    }

    void key_value(const Layer& w, int l, int t, int g) {
        const int D = c.head_dim, H = c.n_heads, G = c.n_kv_heads;
        const float* row = &e.qkv_[(size_t)t * c.qkv()];
        float* k = &e.k_[((size_t)t * G + g) * D];
        turn(row + (H + g) * D, w.k_norm, t, k);
        int16_t k_int[MAX_HEAD_DIM], v_int[MAX_HEAD_DIM];
        float dk, dv;
        kernels.quantise_head(k, D, k_int, &dk);
        kernels.quantise_head(row + (H + G + g) * D, D, v_int, &dv);
        const int position = b.positions[t];
        const int32_t* pages = b.pages + (size_t)b.sequence[t] * b.pages_per_sequence;
        kernels.store(e.layout_, e.page(l, pages[position / TILE], g), position % TILE, k_int, dk,
                      v_int, dv);
    }

    // A work item is QUERY_BLOCK query vectors of one key-value head and one sequence: the heads of
    // its group for one token, then for the next.
    void attend(int l) {
        const int D = c.head_dim, group = c.n_heads / c.n_kv_heads;
        auto blocks = [&](int tokens) {
            return (tokens * group + QUERY_BLOCK - 1) / QUERY_BLOCK * c.n_kv_heads;
        };
        auto end_of = [&](int t) {
            int end = t;
            while (end < T && b.sequence[end] == b.sequence[t]) ++end;
            return end;
        };
        int items = 0;
        for (int t = 0; t < T; t = end_of(t)) items += blocks(end_of(t) - t);
        team.each(items, [&](int i) {
            int first = 0, end = end_of(0);
            for (; i >= blocks(end - first); first = end, end = end_of(first))
                i -= blocks(end - first);
            const int g = i % c.n_kv_heads, n = (end - first) * group;
            Query queries[QUERY_BLOCK];
            int count = 0;
            for (int j = i / c.n_kv_heads * QUERY_BLOCK; j < n && count < QUERY_BLOCK; ++j) {
                const int t = first + j / group, h = g * group + j % group;
                const size_t at = (size_t)t * c.n_heads + h;
                queries[count++] = {&e.q_int_[at * e.layout_.padded], e.dq_[at], b.positions[t],
                                    e.attention_.row(t) + h * D};
            }
            const Pages pages = {e.page(l, 0, g), c.n_kv_heads * e.layout_.bytes,
                                 b.pages + (size_t)b.sequence[first] * b.pages_per_sequence};
            kernels.attention(e.layout_, pages, queries, count);
        });
    }

    void feed_forward(int thread, int l) {
        const Layer& w = e.layers_[l];
        show(thread, "ffn_norm", l, e.normed_.values.data(), {T, c.hidden});
        if (c.moe()) route(thread, l);
        Experts& x = e.experts_;
        x.run(team, kernels, c.planes, w.experts, e.normed_);
        const int k = c.n_experts_used;
        const float* next_norm =
            l + 1 < (int)e.layers_.size() ? e.layers_[l + 1].attn_norm : nullptr;
        if (c.moe()) {
            show(thread, "moe_expert_gate", l, x.gate.data(), {T, k, c.ffn});
            show(thread, "moe_expert_up", l, x.up.data(), {T, k, c.ffn});
            show(thread, "moe_expert_swiglu", l, x.swiglu.values.data(), {T, k, c.ffn});
            show(thread, "moe_expert_out", l, x.out.data(), {T, k, c.hidden});
            team.each(T, [&](int t) {
                x.combine(kernels, t, e.weights_.data(), row(e.sum_, t));
                add_residual(t, row(e.sum_, t), next_norm);
            });
            show(thread, "moe_ffn_out", l, e.sum_.data(), {T, c.hidden});
        } else {
            show(thread, "ffn_gate", l, x.gate.data(), {T, c.ffn});
            show(thread, "ffn_up", l, x.up.data(), {T, c.ffn});
            show(thread, "ffn_swiglu", l, x.swiglu.values.data(), {T, c.ffn});
            show(thread, "ffn_out", l, x.out.data(), {T, c.hidden});
            team.each(T, [&](int t) { add_residual(t, row(x.out, t), next_norm); });
        }
        show(thread, "post_ffn_residual", l, e.x_.data(), {T, c.hidden});
    }

    void route(int thread, int l) {
        const int E = c.n_experts, k = c.n_experts_used;
        const Job router = job(kernels, c.planes, e.layers_[l].router, e.normed_, T,
                               e.router_.data(), E);
        multiply(team, &router, 1);
        show(thread, "moe_router_logits", l, e.router_.data(), {T, E});
        auto choose = [&](int t) {
            kernels.top_k(&e.router_[(size_t)t * E], E, k, c.normalise_experts,
                          &e.ids_[(size_t)t * k], &e.weights_[(size_t)t * k],
                          &e.probabilities_[(size_t)t * E]);
        };
        team.each(T, choose, [&] { e.experts_.group(e.ids_.data(), E); });
        show(thread, "moe_router", l, e.weights_.data(), {T, k});
        show(thread, "moe_router_indices", l, e.ids_.data(), {T, k});
    }

    void finish(int thread) {
        const int R = b.n_logit_rows;
        if (tap && tap->wants("final_norm")) {
            team.each(T, [&](int t) { normalise(t, e.output_norm_); });
            show(thread, "final_norm", -1, e.normed_.values.data(), {T, c.hidden});
        }
        team.each(R, [&](int r) {
            kernels.rms_norm(row(e.x_, b.logit_rows[r]), e.output_norm_, c.hidden, c.eps,
                             e.final_.row(r));
            e.final_.quantise(kernels, r, c.planes);
        });
        const Job out = job(kernels, c.planes, e.output_, e.final_, R, logits, c.vocab);
        multiply(team, &out, 1);
        show(thread, "lm_head", -1, logits, {R, c.vocab});
    }
};

void Engine::forward(const Batch& batch, float* logits, Tap* tap,
                     const std::function<bool()>& stop) {
    Pass pass{*this, batch, logits, tap, stop};
    pass.prepare();
    team_.run([&](int thread) { pass.run(thread); });
}

}  // namespace isobit
