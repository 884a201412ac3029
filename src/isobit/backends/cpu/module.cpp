// The Python module isobit.backends.cpu._cpu: checks what comes in, then calls the engine or one
// operation with the GIL released. Every array is C-contiguous; outputs are written in place.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <set>
#include <stdexcept>

#include "forward.h"

namespace nb = nanobind;
using namespace isobit;

namespace {

template <class T, int N>
using Array = nb::ndarray<T, nb::ndim<N>, nb::c_contig, nb::device::cpu>;
template <class T, int N>
using Input_ = Array<const T, N>;

void require(bool good, const char* message) {
    if (!good) throw std::invalid_argument(message);
}

const Kernels& kernels_named(const std::string& simd) {
    const Kernels* k = find_kernels(simd.empty() ? nullptr : simd.c_str());
    if (!k) throw std::invalid_argument("simd: this machine or build has no level " + simd);
    return *k;
}

// A matrix, or a stack of them, and the array that owns its bytes.
struct PyMatrix {
    Matrix m;
    Input_<uint8_t, 1> owner;

    PyMatrix(Input_<uint8_t, 1> data, int type, int stack, int rows, int columns, size_t row_bytes)
        : m{data.data(), type, rows, columns, row_bytes}, owner(data) {
        require(stack > 0 && rows > 0 && columns > 0, "Matrix: expected a positive shape");
        require(data.size() == (size_t)stack * rows * row_bytes, "Matrix: wrong number of bytes");
        require(usable_kernels(0)->matmul(type, 2), "Matrix: unknown format");
    }
};

class PyTap : public Tap {
public:
    PyTap(nb::object callback, const std::vector<std::string>& stages)
        : callback_(callback), stages_(stages.begin(), stages.end()) {}

    bool wants(const char* stage) const override { return stages_.count(stage) != 0; }
    void take(const char* stage, int layer, const float* data,
              std::initializer_list<int> shape) override {
        give(stage, layer, data, shape);
    }
    void take(const char* stage, int layer, const int32_t* data,
              std::initializer_list<int> shape) override {
        give(stage, layer, data, shape);
    }

    // What the callback raised; the pass runs to its end before this is raised again.
    std::exception_ptr error;

private:
    template <class T>
    void give(const char* stage, int layer, const T* data, std::initializer_list<int> shape) {
        if (error) return;
        nb::gil_scoped_acquire gil;
        try {
            std::vector<size_t> dims(shape.begin(), shape.end());
            nb::ndarray<nb::numpy, const T> view(data, dims.size(), dims.data(), nb::handle());
            nb::object copy = nb::cast(view, nb::rv_policy::copy);
            callback_(stage, layer < 0 ? nb::none() : nb::object(nb::int_(layer)), copy);
        } catch (...) {
            error = std::current_exception();
        }
    }

    nb::object callback_;
    std::set<std::string> stages_;
};

// From so many on, a pass takes long enough that Ctrl-C should not have to wait for its end. Shorter
// ones are not asked: taking the interpreter's lock can cost milliseconds a layer beside other threads.
constexpr size_t MANY_TOKENS = 16;

class PyEngine {
public:
    PyEngine(nb::dict config, nb::list layers, const PyMatrix& embedding,
             Input_<float, 1> output_norm, const PyMatrix& output, const std::string& simd,
             int threads) {
        auto number = [&](const char* key) { return nb::cast<int>(config[key]); };
        config_ = {number("hidden"),
                   number("n_heads"),
                   number("n_kv_heads"),
                   number("head_dim"),
                   number("ffn"),
                   number("n_experts"),
                   number("n_experts_used"),
                   number("vocab"),
                   nb::cast<float>(config["eps"]),
                   nb::cast<float>(config["attention_scale"]),
                   nb::cast<bool>(config["normalise_experts"]),
                   number("planes"),
                   0};
        const long long pages = nb::cast<long long>(config["pages"]);
        if (pages > INT32_MAX) throw std::bad_alloc();
        config_.pages = (int)pages;
        require(config_.head_dim <= MAX_HEAD_DIM, "head_dim: too large");
        owners_.append(nb::make_tuple(layers, output_norm, embedding.owner, output.owner));
        std::vector<Layer> all;
        for (nb::handle item : layers) all.push_back(layer(nb::cast<nb::dict>(item)));
        engine_ = std::make_unique<Engine>(config_, std::move(all), embedding.m,
                                           output_norm.data(), output.m, kernels_named(simd),
                                           threads);
    }

    void forward(Input_<int32_t, 1> tokens, Input_<int32_t, 1> positions,
                 Input_<int32_t, 1> sequence, Input_<int32_t, 2> pages,
                 Input_<int32_t, 1> logit_rows, Input_<float, 2> cos, Input_<float, 2> sin,
                 Array<float, 2> logits, nb::object callback,
                 const std::vector<std::string>& stages) {
        const size_t T = tokens.shape(0), half = config_.head_dim / 2;
        require(T > 0, "batch: expected at least one token");
        require(positions.shape(0) == T && sequence.shape(0) == T,
                "batch: expected as many positions and sequences as tokens");
        require(cos.shape(0) == T && sin.shape(0) == T && cos.shape(1) == half &&
                    sin.shape(1) == half,
                "batch: expected RoPE tables [tokens, head_dim / 2]");
        require(logits.shape(0) == logit_rows.shape(0) && logits.shape(1) == (size_t)config_.vocab,
                "batch: expected logits [logit_rows, vocabulary]");
        const Batch batch = {(int)T,
                             (int)pages.shape(0),
                             (int)pages.shape(1),
                             (int)logit_rows.shape(0),
                             tokens.data(),
                             positions.data(),
                             sequence.data(),
                             pages.data(),
                             logit_rows.data(),
                             cos.data(),
                             sin.data()};
        check(batch);
        PyTap tap(callback, stages);
        std::function<bool()> interrupted;
        if (T >= MANY_TOKENS)
            interrupted = [] {
                nb::gil_scoped_acquire gil;
                return PyErr_CheckSignals() != 0;
            };
        {
            nb::gil_scoped_release nogil;
            engine_->forward(batch, logits.data(), stages.empty() ? nullptr : &tap, interrupted);
        }
        if (PyErr_Occurred()) throw nb::python_error();
        if (tap.error) std::rethrow_exception(tap.error);
    }

private:
    static Matrix matrix(nb::dict d, const char* key) {
        return d.contains(key) ? nb::cast<const PyMatrix&>(d[key]).m : Matrix{};
    }

    static Layer layer(nb::dict d) {
        auto vector = [&](const char* key) {
            return nb::cast<Input_<float, 1>>(d[key]).data();
        };
        return {vector("attn_norm"),
                vector("q_norm"),
                vector("k_norm"),
                vector("ffn_norm"),
                matrix(d, "q"),
                matrix(d, "k"),
                matrix(d, "v"),
                matrix(d, "attn_output"),
                matrix(d, "router"),
                {matrix(d, "gate"), matrix(d, "up"), matrix(d, "down")}};
    }

    void check(const Batch& b) const {
        for (int i = 0; i < b.n_tokens; ++i) {
            require(b.tokens[i] >= 0 && b.tokens[i] < config_.vocab, "batch: token out of range");
            require(b.sequence[i] >= 0 && b.sequence[i] < b.n_sequences,
                    "batch: sequence out of range");
            require(b.positions[i] >= 0 && b.positions[i] / TILE < b.pages_per_sequence,
                    "batch: position beyond the page table");
            const int32_t* row = b.pages + (size_t)b.sequence[i] * b.pages_per_sequence;
            for (int t = 0; t <= b.positions[i] / TILE; ++t)
                require(row[t] >= 0 && row[t] < config_.pages, "batch: page out of range");
        }
        for (int i = 0; i < b.n_logit_rows; ++i)
            require(b.logit_rows[i] >= 0 && b.logit_rows[i] < b.n_tokens,
                    "batch: logit row out of range");
    }

    Config config_;
    nb::list owners_;
    std::unique_ptr<Engine> engine_;
};

// Single operations on host arrays, through the kernels that the pass uses.
class PyOps {
public:
    PyOps(const std::string& simd, int threads) : kernels_(kernels_named(simd)), team_(threads) {}

    void dequantise(const PyMatrix& w, Array<float, 2> out) {
        require(out.shape(0) * w.m.row_bytes <= w.owner.size() &&
                    out.shape(1) == (size_t)w.m.columns,
                "dequantise: expected out [rows, columns]");
        each(out.shape(0), [&](int i) {
            kernels_.dequantise(w.m.type, w.m.data + i * w.m.row_bytes, w.m.columns,
                                out.data() + (size_t)i * w.m.columns);
        });
    }

    void quantise(Input_<float, 2> x, int planes, Array<int32_t, 2> q, Array<float, 2> d) {
        const int T = (int)x.shape(0), K = (int)x.shape(1), blocks = blocks_of(K);
        require(q.shape(0) == x.shape(0) && q.shape(1) == x.shape(1) &&
                    d.shape(0) == x.shape(0) && d.shape(1) == (size_t)blocks,
                "quantise: expected q [T, K] and d [T, blocks]");
        Input in = input(x, planes);
        for (int t = 0; t < T; ++t) {
            for (int s = 0; s < blocks; ++s) d.data()[t * blocks + s] = in.fixed[t * blocks + s].d;
            for (int k = 0; k < K; ++k) {
                const Activations& a = in.fixed[t * blocks + k / SUPERBLOCK];
                int high = a.plane[0][k % SUPERBLOCK], low = a.plane[1][k % SUPERBLOCK];
                q.data()[t * K + k] = planes == 2 ? high * 256 + low : high;
            }
        }
    }

    void matmul(const PyMatrix& w, Input_<float, 2> x, int planes, Array<float, 2> y) {
        require(x.shape(1) == (size_t)w.m.columns && y.shape(0) == x.shape(0) &&
                    y.shape(1) == (size_t)w.m.rows,
                "matmul: expected x [T, columns] and y [T, rows]");
        Input in = input(x, planes);
        const Job one = job(kernels_, planes, w.m, in, (int)x.shape(0), y.data(), w.m.rows);
        nb::gil_scoped_release nogil;
        team_.run([&](int) { multiply(team_, &one, 1); });
    }

    void rms_norm(Input_<float, 2> x, Input_<float, 1> weight, float eps, Array<float, 2> y) {
        const int n = (int)x.shape(1);
        require(same(x, y) && weight.shape(0) == x.shape(1), "rms_norm: shapes differ");
        each(x.shape(0), [&](int t) {
            kernels_.rms_norm(x.data() + (size_t)t * n, weight.data(), n, eps,
                              y.data() + (size_t)t * n);
        });
    }

    void rope(Input_<float, 3> x, Input_<float, 2> cos, Input_<float, 2> sin, Array<float, 3> y) {
        const size_t H = x.shape(1), D = x.shape(2);
        require(y.shape(0) == x.shape(0) && y.shape(1) == H && y.shape(2) == D &&
                    cos.shape(0) == x.shape(0) && cos.shape(1) == D / 2 &&
                    sin.shape(0) == x.shape(0) && sin.shape(1) == D / 2,
                "rope: shapes differ");
        each(x.shape(0) * H, [&](int i) {
            const size_t turn = i / H * (D / 2);
            kernels_.rope(x.data() + i * D, cos.data() + turn, sin.data() + turn, (int)D,
                          y.data() + i * D);
        });
    }

    void exp(Input_<float, 1> x, Array<float, 1> y) {
        require(x.shape(0) == y.shape(0), "exp: shapes differ");
        each(1, [&](int) { kernels_.exp(x.data(), (int)x.shape(0), y.data()); });
    }

    void silu_gate(Input_<float, 2> gate, Input_<float, 2> up, Array<float, 2> y) {
        require(same(gate, up) && same(gate, y), "silu_gate: shapes differ");
        const size_t n = gate.shape(1);
        each(gate.shape(0), [&](int t) {
            kernels_.silu_gate(gate.data() + t * n, up.data() + t * n, (int)n, y.data() + t * n);
        });
    }

    void top_k(Input_<float, 2> z, bool normalise, Array<int32_t, 2> ids, Array<float, 2> weights,
               Array<float, 2> p) {
        const size_t E = z.shape(1), k = ids.shape(1);
        require(ids.shape(0) == z.shape(0) && same(ids, weights) && same(z, p) && k <= E,
                "top_k: shapes differ");
        each(z.shape(0), [&](int t) {
            kernels_.top_k(z.data() + t * E, (int)E, (int)k, normalise, ids.data() + t * k,
                           weights.data() + t * k, p.data() + t * E);
        });
    }

    void combine(Input_<float, 2> weights, Input_<float, 3> y, Array<float, 2> out) {
        const size_t k = y.shape(1), n = y.shape(2);
        require(weights.shape(0) == y.shape(0) && weights.shape(1) == k &&
                    out.shape(0) == y.shape(0) && out.shape(1) == n,
                "combine: shapes differ");
        each(y.shape(0), [&](int t) {
            kernels_.combine(weights.data() + t * k, y.data() + t * k * n, (int)k, (int)n,
                             out.data() + t * n);
        });
    }

    void attention(Input_<float, 2> q, Input_<int32_t, 1> positions, Input_<int16_t, 2> k,
                   Input_<float, 1> dk, Input_<int16_t, 2> v, Input_<float, 1> dv, float scale,
                   Array<float, 2> out) {
        const int T = (int)q.shape(0), D = (int)q.shape(1), n = (int)k.shape(0);
        require(D % 2 == 0 && D <= MAX_HEAD_DIM && k.shape(1) == (size_t)D && same(k, v) &&
                    dk.shape(0) == (size_t)n && dv.shape(0) == (size_t)n && same(q, out) &&
                    positions.shape(0) == (size_t)T,
                "attention: shapes differ");
        for (int t = 0; t < T; ++t)
            require(positions.data()[t] >= 0 && positions.data()[t] < n,
                    "attention: position without a key");
        const PageLayout layout = page_layout(D);
        const int tiles = (n + TILE - 1) / TILE;
        std::vector<Activations> memory(tiles * layout.bytes / sizeof(Activations) + 1);
        uint8_t* base = (uint8_t*)memory.data();
        std::vector<int32_t> table(tiles);
        for (int t = 0; t < tiles; ++t) table[t] = tiles - 1 - t;
        for (int j = 0; j < n; ++j)
            kernels_.store(layout, base + table[j / TILE] * layout.bytes, j % TILE,
                           k.data() + (size_t)j * D, dk.data()[j], v.data() + (size_t)j * D,
                           dv.data()[j]);
        std::vector<int16_t> integers((size_t)T * layout.padded);
        std::vector<Query> queries(T);
        each(T, [&](int t) {
            float d;
            int16_t* at = &integers[(size_t)t * layout.padded];
            kernels_.quantise_head(q.data() + (size_t)t * D, D, at, &d);
            queries[t] = {at, d * scale, positions.data()[t], out.data() + (size_t)t * D};
        });
        const Pages pages = {base, layout.bytes, table.data()};
        each((T + QUERY_BLOCK - 1) / QUERY_BLOCK, [&](int i) {
            kernels_.attention(layout, pages, &queries[i * QUERY_BLOCK],
                               std::min(QUERY_BLOCK, T - i * QUERY_BLOCK));
        });
    }

    void experts(const PyMatrix& gate, const PyMatrix& up, const PyMatrix& down,
                 Input_<float, 2> x, Input_<int32_t, 2> ids, int planes, Array<float, 3> g,
                 Array<float, 3> u, Array<float, 3> a, Array<float, 3> y) {
        const int T = (int)x.shape(0), k = (int)ids.shape(1), F = gate.m.rows, N = down.m.rows;
        const int E = (int)(gate.owner.size() / (gate.m.rows * gate.m.row_bytes));
        require(ids.shape(0) == (size_t)T && x.shape(1) == (size_t)gate.m.columns &&
                    up.m.rows == F && up.m.columns == gate.m.columns && down.m.columns == F &&
                    up.owner.size() == E * up.m.rows * up.m.row_bytes &&
                    down.owner.size() == E * down.m.rows * down.m.row_bytes,
                "experts: shapes differ");
        for (const auto& out : {g, u, a, y})
            require(out.shape(0) == (size_t)T && out.shape(1) == (size_t)k, "experts: shapes differ");
        require(g.shape(2) == (size_t)F && u.shape(2) == (size_t)F && a.shape(2) == (size_t)F &&
                    y.shape(2) == (size_t)N,
                "experts: shapes differ");
        for (size_t i = 0; i < ids.size(); ++i)
            require(ids.data()[i] >= 0 && ids.data()[i] < E, "experts: id out of range");
        Input in = input(x, planes);
        Experts experts;
        experts.resize(T, k, F, N);
        experts.group(ids.data(), E);
        const FeedForward w = {gate.m, up.m, down.m};
        team_.run([&](int) { experts.run(team_, kernels_, planes, w, in); });
        std::copy_n(experts.gate.data(), g.size(), g.data());
        std::copy_n(experts.up.data(), u.size(), u.data());
        std::copy_n(experts.swiglu.values.data(), a.size(), a.data());
        std::copy_n(experts.out.data(), y.size(), y.data());
    }

private:
    template <class A, class B>
    static bool same(const A& a, const B& b) {
        return a.shape(0) == b.shape(0) && a.shape(1) == b.shape(1);
    }

    template <class F>
    void each(size_t n, F&& f) {
        nb::gil_scoped_release nogil;
        team_.run([&](int) { team_.each((int)n, f); });
    }

    Input input(const Input_<float, 2>& x, int planes) {
        require(planes == 1 || planes == 2, "planes: expected 1 or 2");
        Input in;
        in.resize((int)x.shape(0), (int)x.shape(1));
        std::copy_n(x.data(), x.size(), in.values.data());
        each(x.shape(0), [&](int t) { in.quantise(kernels_, t, planes); });
        return in;
    }

    const Kernels& kernels_;
    Team team_;
};

}  // namespace

NB_MODULE(_cpu, m) {
    m.def("simd_levels", [] {
        std::vector<std::string> names;
        for (int i = 0; const Kernels* k = usable_kernels(i); ++i) names.push_back(k->name);
        return names;
    });
    nb::class_<PyMatrix>(m, "Matrix")
        .def(nb::init<Input_<uint8_t, 1>, int, int, int, int, size_t>());
    nb::class_<PyEngine>(m, "Engine")
        .def(nb::init<nb::dict, nb::list, const PyMatrix&, Input_<float, 1>, const PyMatrix&,
                      const std::string&, int>())
        .def("forward", &PyEngine::forward, nb::arg("tokens"), nb::arg("positions"),
             nb::arg("sequence"), nb::arg("pages"), nb::arg("logit_rows"), nb::arg("cos"),
             nb::arg("sin"), nb::arg("logits"), nb::arg("tap").none(), nb::arg("stages"));
    nb::class_<PyOps>(m, "Ops")
        .def(nb::init<const std::string&, int>())
        .def("dequantise", &PyOps::dequantise)
        .def("quantise", &PyOps::quantise)
        .def("matmul", &PyOps::matmul)
        .def("rms_norm", &PyOps::rms_norm)
        .def("rope", &PyOps::rope)
        .def("exp", &PyOps::exp)
        .def("silu_gate", &PyOps::silu_gate)
        .def("top_k", &PyOps::top_k)
        .def("combine", &PyOps::combine)
        .def("attention", &PyOps::attention)
        .def("experts", &PyOps::experts);
}
