// A model ready to run: its weights by role, its KV cache, and one pass over a batch.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "kernels/kernels.h"
#include "matmul.h"
#include "moe.h"
#include "threads.h"

namespace isobit {

struct Config {
    int hidden, n_heads, n_kv_heads, head_dim, ffn, n_experts, n_experts_used, vocab;
    float eps, attention_scale;
    bool normalise_experts;
    int planes;
    int pages;  // of the KV cache

    bool moe() const { return n_experts > 0; }
    int qkv() const { return (n_heads + 2 * n_kv_heads) * head_dim; }
};

struct Layer {
    const float *attn_norm, *q_norm, *k_norm, *ffn_norm;
    Matrix q, k, v, attn_output, router;
    FeedForward experts;
};

// See isobit.backends.base.Batch; cos and sin are [tokens, head_dim / 2] for the tokens' positions.
struct Batch {
    int n_tokens, n_sequences, pages_per_sequence, n_logit_rows;
    const int32_t *tokens, *positions, *sequence, *pages, *logit_rows;
    const float *cos, *sin;
};

// Receives stages of the pass (names: isobit.model.stages); layer is -1 outside the layers.
class Tap {
public:
    virtual ~Tap() = default;
    virtual bool wants(const char* stage) const = 0;
    virtual void take(const char* stage, int layer, const float* data,
                      std::initializer_list<int> shape) = 0;
    virtual void take(const char* stage, int layer, const int32_t* data,
                      std::initializer_list<int> shape) = 0;
};

// Memory that takes none until it is touched.
class LazyMemory {
public:
    explicit LazyMemory(size_t bytes);
    ~LazyMemory();
    LazyMemory(const LazyMemory&) = delete;
    LazyMemory& operator=(const LazyMemory&) = delete;
    uint8_t* data() const { return data_; }

private:
    uint8_t* data_;
    size_t bytes_;
};

class Engine {
public:
    Engine(const Config& config, std::vector<Layer> layers, const Matrix& embedding,
           const float* output_norm, const Matrix& output, const Kernels& kernels, int threads);

    // logits: [n_logit_rows, vocab]. tap may be null. stop, unless it is empty, is asked before each
    // layer; once it says true the pass ends, without logits.
    void forward(const Batch& batch, float* logits, Tap* tap, const std::function<bool()>& stop);

private:
    struct Pass;

    uint8_t* page(int layer, int page, int head) const;

    Config c_;
    std::vector<Layer> layers_;
    Matrix embedding_, output_;
    const float* output_norm_;
    const Kernels& kernels_;
    PageLayout layout_;
    LazyMemory cache_;
    Team team_;

    // Buffers of a pass, as long as the longest so far.
    std::vector<float> x_, qkv_, q_, k_, dq_, sum_, router_, probabilities_, weights_;
    std::vector<int16_t> q_int_;
    std::vector<int32_t> ids_;
    Input normed_, attention_, final_;
    Experts experts_;
};

}  // namespace isobit
