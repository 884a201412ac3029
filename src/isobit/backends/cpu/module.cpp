// The Python module isobit.backends.cpu._cpu: checks what comes in, then runs one operation with the
// GIL released. Every array is C-contiguous; outputs are written in place.

#include "module.h"

#include <nanobind/stl/tuple.h>

#include <memory>
#include <tuple>

#include "attention.h"
#include "moe.h"
#include "threads.h"

using namespace isobit;

namespace {

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
            std::vector<int32_t> keys(E);
            kernels_.top_k(z.data() + t * E, (int)E, {(int)k, normalise}, ids.data() + t * k,
                           weights.data() + t * k, p.data() + t * E, keys.data());
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
                   int window, Input_<float, 1> sink, Array<float, 2> out) {
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
            run_of<Store>(kernels_)(layout, base + table[j / TILE] * layout.bytes, j % TILE,
                                    k.data() + (size_t)j * D, dk.data()[j],
                                    v.data() + (size_t)j * D, dv.data()[j]);
        std::vector<int16_t> integers((size_t)T * layout.padded);
        std::vector<Query> queries(T);
        each(T, [&](int t) {
            float d;
            int16_t* at = &integers[(size_t)t * layout.padded];
            kernels_.quantise_head(q.data() + (size_t)t * D, D, at, &d);
            const int position = positions.data()[t], beyond = window ? position - window + 1 : 0;
            queries[t] = {at, d * scale, std::max(beyond, 0), position,
                          sink.size() ? sink.data() : nullptr, out.data() + (size_t)t * D};
        });
        const Pages pages = {base, layout.bytes, table.data()};
        each((T + QUERY_BLOCK - 1) / QUERY_BLOCK, [&](int i) {
            run_of<Attend>(kernels_)(layout, pages, &queries[i * QUERY_BLOCK],
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
        Groups groups;
        groups.group(ids.data(), 0, E, T, k);
        Input inner;
        inner.resize(T * k, F);
        const Matrix both[] = {gate.m, up.m};
        float* const to[] = {g.data(), u.data()};
        float* const out = y.data();
        team_.run([&](int) {
            groups.run(team_, kernels_, planes, both, 2, in, false, to,
                       [&](int pair, int begin, int end) {
                           const size_t at = (size_t)pair * F + begin;
                           kernels_.silu_gate(&g.data()[at], &u.data()[at], end - begin,
                                              &inner.values[at]);
                       });
            team_.each(T * k, [&](int pair) { inner.quantise(kernels_, pair, planes); });
            groups.run(team_, kernels_, planes, &down.m, 1, inner, true, &out,
                       [](int, int, int) {});
        });
        std::copy_n(inner.values.data(), a.size(), a.data());
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
    m.def("formats", [] {
        std::vector<std::tuple<std::string, int, int, int>> all;
        for (const FormatInfo* f = usable_kernels(0)->formats; f->name; ++f)
            all.emplace_back(f->name, f->type, f->block, f->bytes);
        return all;
    });
    // In nanoseconds, for tests.
    nb::class_<Pace>(m, "Pace")
        .def(nb::init<int>())
        .def("members", [](Pace& p, int64_t now) { return p.members(Pace::Clock::time_point(
                                                       std::chrono::nanoseconds(now))); })
        .def("ran", [](Pace& p, int64_t now, int64_t took, int64_t waited) {
            using ns = std::chrono::nanoseconds;
            p.ran(Pace::Clock::time_point(ns(now)), ns(took), ns(waited));
        });
    nb::class_<PyMatrix>(m, "Matrix")
        .def(nb::init<Input_<uint8_t, 1>, int, int, int, int, size_t>());
    bind_batch(m);
    bind_bus(m);
    bind_engine(m);
    bind_sampler(m);
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
