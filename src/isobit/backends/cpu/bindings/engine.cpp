// The engine in Python: takes the program that lowering.py makes, and runs batches, which are checked
// already (batch.cpp), with the GIL released.

#include <nanobind/stl/optional.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <set>

#include "../engine/engine.h"
#include "module.h"

using namespace isobit;

namespace {

class PyTap : public Tap {
public:
    PyTap(nb::object callback, const std::vector<std::string>& stages)
        : callback_(callback), stages_(stages.begin(), stages.end()) {}

    bool wants(const std::string& stage) const override { return stages_.count(stage) != 0; }

    void take(const Show& show, const void* data, int rows) override {
        if (error) return;
        nb::gil_scoped_acquire gil;
        try {
            std::vector<size_t> dims = {(size_t)rows};
            dims.insert(dims.end(), show.shape.begin(), show.shape.end());
            nb::object value = show.integers ? copy((const int32_t*)data, dims)
                                             : copy((const float*)data, dims);
            callback_(show.stage, show.layer < 0 ? nb::none() : nb::object(nb::int_(show.layer)),
                      value);
        } catch (...) {
            error = std::current_exception();
        }
    }

    // What the callback raised, such as Ctrl-C; raised again when the pass has ended.
    std::exception_ptr error;

private:
    template <class T>
    static nb::object copy(const T* data, const std::vector<size_t>& dims) {
        nb::ndarray<nb::numpy, const T> view(data, dims.size(), dims.data(), nb::handle());
        return nb::cast(view, nb::rv_policy::copy);
    }

    nb::object callback_;
    std::set<std::string> stages_;
};

// From so many on, a pass takes long enough that Ctrl-C should not have to wait for its end. Shorter
// ones are not asked: taking the interpreter's lock can cost milliseconds a layer beside other threads.
constexpr size_t MANY_TOKENS = 16;

// Whether this thread is the one that Python handles signals in.
bool handles_signals() {
    const nb::module_ threading = nb::module_::import_("threading");
    return threading.attr("get_ident")().equal(threading.attr("main_thread")().attr("ident"));
}

class PyEngine {
public:
    // exchange: of one part of a split model the memory that all parts share, its number, and how many
    // there are.
    PyEngine(nb::dict program, const std::string& simd, int threads,
             std::optional<std::tuple<Array<uint8_t, 1>, int, int>> exchange) {
        owners_.append(program);
        std::unique_ptr<Exchange> shared;
        if (exchange) {
            auto& [memory, rank, parts] = *exchange;
            shared = std::make_unique<Exchange>(memory.data(), memory.size(), rank, parts);
            owners_.append(nb::cast(memory));
            split_ = true;
        }
        engine_ = std::make_unique<Engine>(read(program), kernels_named(simd), threads,
                                           std::move(shared));
    }

    // Cosines and sines by position of each table, of so many positions.
    void set_rope(const std::vector<std::tuple<Input_<float, 2>, Input_<float, 2>>>& tables) {
        engine_->rope.clear();
        for (const auto& [cos, sin] : tables) {
            require(cos.shape(0) == sin.shape(0) && cos.shape(1) == sin.shape(1),
                    "set_rope: expected cosines and sines [positions, head_dim / 2]");
            engine_->rope.push_back(
                {cos.data(), sin.data(), (int)cos.shape(0), (int)cos.shape(1)});
        }
        rope_ = tables;
    }

    // What it says of how it ended.
    enum { DONE, BROKEN, MORE_ROPE };

    // The batch has been checked. MORE_ROPE: the tables lack a position, and nothing ran.
    int forward(Input_<int32_t, 1> tokens, Input_<int32_t, 1> positions,
                Input_<int32_t, 1> sequence, Input_<int32_t, 2> pages,
                Input_<int32_t, 1> logit_rows, std::optional<Input_<int32_t, 1>> states,
                std::optional<Input_<float, 2>> received,
                std::optional<Array<float, 2>> logits, std::optional<Input_<int32_t, 1>> places,
                Array<int32_t, 1> argmax, Array<bool, 1> finite,
                std::optional<Input_<int32_t, 2>> ids,
                std::optional<Array<float, 2>> values, std::optional<Array<int32_t, 2>> top_ids,
                std::optional<Array<float, 2>> top, std::optional<Array<uint8_t, 2>> digests,
                std::optional<Array<uint8_t, 4>> routes, std::optional<Array<float, 2>> hidden,
                bool only_hidden, nb::object callback,
                const std::vector<std::string>& stages) {
        const size_t T = tokens.shape(0), V = engine_->program().vocab;
        require(T > 0, "batch: expected at least one token");
        require(positions.shape(0) == T && sequence.shape(0) == T,
                "batch: expected as many positions and sequences as tokens");
        for (const RopeRows& table : engine_->rope)
            if (*std::max_element(positions.data(), positions.data() + T) >= table.rows)
                return MORE_ROPE;
        const size_t R = logit_rows.shape(0);
        const Batch batch = {(int)T, (int)pages.shape(1), (int)R,
                             tokens.data(), positions.data(), sequence.data(), pages.data(),
                             logit_rows.data(), states ? states->data() : nullptr,
                             received ? received->data() : nullptr,
                             routes ? routes->data() : nullptr,
                             routes ? (int)routes->shape(3) : 0};
        const Rows rows = {logits ? logits->data() : nullptr,
                           places ? places->data() : nullptr,
                           argmax.data(),
                           ids ? ids->data() : nullptr,
                           ids ? (int)ids->shape(1) : 0,
                           values ? values->data() : nullptr,
                           top ? (int)top->shape(1) : 0,
                           top_ids ? top_ids->data() : nullptr,
                           top ? top->data() : nullptr,
                           digests ? digests->data() : nullptr,
                           hidden ? hidden->data() : nullptr,
                           only_hidden};
        require(argmax.shape(0) == R && finite.shape(0) == R && (!logits || logits->shape(1) == V) &&
                    (!places || (logits && places->shape(0) == R)) &&
                    (!logits || places || logits->shape(0) == R) &&
                    (!ids || (ids->shape(0) == R && values && values->shape(0) == R &&
                              values->shape(1) == ids->shape(1))) &&
                    (!top || (top_ids && top->shape(0) == R && top_ids->shape(0) == R &&
                              top_ids->shape(1) == top->shape(1) && top->shape(1) <= V)) &&
                    (!digests || (digests->shape(0) == R && digests->shape(1) == DIGEST_BYTES)),
                "forward: shapes of results differ");
        const Program& program = engine_->program();
        require(!routes || (routes->shape(0) == T && routes->shape(1) == (size_t)program.routers &&
                            routes->shape(2) == (size_t)program.routed &&
                            (routes->shape(3) == 1 || routes->shape(3) == 2)),
                "forward: expected routes [tokens, routers, k, bytes]");
        require(stages.empty() || (logits && !places), "forward: a tap goes with all logits");
        require(!hidden || (program.hidden_made >= 0 && hidden->shape(0) == R &&
                            hidden->shape(1) == (size_t)program.hidden_width),
                "forward: expected hidden [rows, width]");
        require(!only_hidden || (hidden && !logits && !ids && !top && !digests),
                "forward: something else is wanted than hidden rows");
        for (size_t i = 0; places && i < R; ++i)
            require(places->data()[i] < (int64_t)logits->shape(0), "forward: place out of range");
        for (size_t i = 0; ids && i < ids->size(); ++i)
            require(ids->data()[i] >= 0 && ids->data()[i] < (int32_t)V, "forward: id out of range");
        PyTap tap(callback, stages);
        std::function<bool()> interrupted;
        // Of a split model the other parts go on; and a server's passes would wait for the
        // interpreter at each layer, for what another thread sees.
        if (T >= MANY_TOKENS && !split_ && handles_signals())
            interrupted = [&tap] {
                if (tap.error) return true;
                nb::gil_scoped_acquire gil;
                return PyErr_CheckSignals() != 0;
            };
        bool whole;
        {
            nb::gil_scoped_release nogil;
            whole = engine_->forward(batch, rows, stages.empty() ? nullptr : &tap, interrupted);
        }
        if (PyErr_Occurred()) throw nb::python_error();
        if (tap.error) std::rethrow_exception(tap.error);
        for (size_t i = 0; i < R; ++i) finite.data()[i] = argmax.data()[i] >= 0;
        return whole ? DONE : BROKEN;
    }

    void copy_state(int from, int to) {
        const int n = engine_->program().sequences;
        require(from >= 0 && from < n && to >= 0 && to < n, "state: out of range");
        engine_->copy_state(from, to);
    }

    void fence() { engine_->fence(); }
    bool intact() { return engine_->intact(); }
    int lanes() { return engine_->lanes(); }

    std::vector<std::tuple<double, double>> spent() {
        std::vector<std::tuple<double, double>> all;
        for (const Engine::Spent& s : engine_->spent())
            all.emplace_back(std::chrono::duration<double>(s.took).count(),
                             std::chrono::duration<double>(s.stood).count());
        return all;
    }

private:
    static Ref ref(nb::handle h) {
        const auto [slot, width, offset, step, gather] =
            nb::cast<std::tuple<int, int, int, int, bool>>(h);
        return {slot, width, offset, step, gather};
    }

    template <class T, class F>
    static std::vector<T> each(nb::handle list, F&& read) {
        std::vector<T> out;
        for (nb::handle h : list) out.push_back(read(h));
        return out;
    }

    static Op op(nb::dict d, bool named) {
        Op o;
        const auto kind = nb::cast<std::string>(d["kind"]);
        if (named && !(o.run = OpKind::find(kind)))
            throw std::invalid_argument("program: unknown operation " + kind);
        o.in = each<Ref>(d["in"], ref);
        o.out = each<Ref>(d["out"], ref);
        o.vectors = each<const float*>(d["vectors"], [](nb::handle h) {
            Input_<float, 1> vector;  // not converted: the copy would be gone before the first pass
            require(nb::try_cast(h, vector, false), "program: expected vectors of float32 in one piece");
            return vector.data();
        });
        o.matrices = each<Matrix>(
            d["matrices"], [](nb::handle h) { return nb::cast<const PyMatrix&>(h).m; });
        o.numbers = nb::cast<std::vector<float>>(d["numbers"]);
        o.integers = nb::cast<std::vector<int>>(d["integers"]);
        return o;
    }

    static Phase phase(nb::dict d) {
        Phase p;
        const auto kind = nb::cast<std::string>(d["kind"]);
        if (!(p.run = PhaseKind::find(kind)))
            throw std::invalid_argument("program: unknown phase " + kind);
        p.layer = nb::cast<int>(d["layer"]);
        p.logit_rows = nb::cast<bool>(d["logit_rows"]);
        p.traced = nb::cast<bool>(d["traced"]);
        for (nb::handle h : d["chains"]) {
            const auto [vectors, at_once, ops] = nb::cast<std::tuple<int, int, nb::list>>(h);
            p.chains.push_back({vectors, at_once, each<Op>(ops, [](nb::handle o) {
                                    return op(nb::cast<nb::dict>(o), true);
                                })});
        }
        p.after = each<Op>(d["after"],
                           [](nb::handle o) { return op(nb::cast<nb::dict>(o), true); });
        if (!d["op"].is_none()) p.op = op(nb::cast<nb::dict>(d["op"]), false);
        require(p.op.matrices.size() <= MOST_PRODUCTS, "program: too many products in one phase");
        for (nb::handle h : d["shows"]) {
            const auto [stage, layer, value, integers, logit_rows, shape] = nb::cast<
                std::tuple<std::string, int, nb::object, bool, bool, std::vector<int>>>(h);
            p.shows.push_back({stage, layer, ref(value), integers, logit_rows, shape});
        }
        return p;
    }

    static Program read(nb::dict d) {
        Program p;
        for (nb::handle h : d["slots"]) {
            const auto [width, vector, integers, fixed, query] =
                nb::cast<std::tuple<int, int, int, int, int>>(h);
            p.slots.push_back({width, vector, integers != 0, fixed != 0, query != 0});
        }
        for (nb::handle h : d["caches"]) {
            const auto [heads, head_dim] = nb::cast<std::tuple<int, int>>(h);
            require(head_dim <= MAX_HEAD_DIM, "head_dim: too large");
            p.caches.push_back({heads, head_dim});
        }
        p.states = nb::cast<std::vector<size_t>>(d["states"]);
        p.sequences = nb::cast<int>(d["sequences"]);
        p.phases = each<Phase>(d["phases"], [](nb::handle h) { return phase(nb::cast<nb::dict>(h)); });
        p.scratch = nb::cast<int>(d["scratch"]);
        p.scratch_values = nb::cast<int>(d["scratch_values"]);
        p.vocab = nb::cast<int>(d["vocab"]);
        p.lane_tokens = nb::cast<int>(d["lane_tokens"]);
        p.routers = nb::cast<int>(d["routers"]);
        p.routed = nb::cast<int>(d["routed"]);
        if (!d["hidden"].is_none()) {
            const auto [made, place, width] = nb::cast<std::tuple<int, nb::object, int>>(d["hidden"]);
            p.hidden_made = made;
            p.hidden = ref(place);
            p.hidden_width = width;
        }
        p.planes = nb::cast<int>(d["planes"]);
        const auto pages = nb::cast<long long>(d["pages"]);
        if (pages > INT32_MAX) throw std::bad_alloc();
        p.pages = (int)pages;
        return p;
    }

    nb::list owners_;
    std::vector<std::tuple<Input_<float, 2>, Input_<float, 2>>> rope_;
    bool split_ = false;
    std::unique_ptr<Engine> engine_;
};

}  // namespace

void bind_engine(nb::module_& m) {
    nb::class_<PyEngine>(m, "Engine")
        .def(nb::init<nb::dict, const std::string&, int,
                      std::optional<std::tuple<Array<uint8_t, 1>, int, int>>>(),
             nb::arg("program"), nb::arg("simd"), nb::arg("threads"),
             nb::arg("exchange").none() = nb::none())
        .def("set_rope", &PyEngine::set_rope)
        .def("fence", &PyEngine::fence)
        .def("intact", &PyEngine::intact)
        .def("lanes", &PyEngine::lanes)
        .def("spent", &PyEngine::spent)
        .def("copy_state", &PyEngine::copy_state, nb::arg("source"), nb::arg("target"))
        .def("forward", &PyEngine::forward, nb::arg("tokens"), nb::arg("positions"),
             nb::arg("sequence"), nb::arg("pages"), nb::arg("logit_rows"), nb::arg("states").none(),
             nb::arg("received").none(), nb::arg("logits").none(), nb::arg("places").none(), nb::arg("argmax"),
             nb::arg("finite"), nb::arg("ids").none(), nb::arg("values").none(), nb::arg("top_ids").none(),
             nb::arg("top").none(), nb::arg("digests").none(), nb::arg("routes").none(),
             nb::arg("hidden").none(), nb::arg("only_hidden"), nb::arg("tap").none(), nb::arg("stages"));
}
