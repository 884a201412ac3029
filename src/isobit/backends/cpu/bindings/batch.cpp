// The check of a batch that all backends share (isobit.backends.base): what it names lies within a
// model's limits. Compiled, since it stands before every pass.

#include <nanobind/stl/optional.h>

#include <algorithm>
#include <optional>

#include "module.h"

using isobit::KV_PAGE;

namespace {

[[noreturn]] void refuse(const std::string& message) {
    const nb::object kind = nb::module_::import_("isobit.errors").attr("UsageError");
    PyErr_SetString(kind.ptr(), ("batch " + message).c_str());
    throw nb::python_error();
}

// A contiguous int32 array of so many dimensions, as a batch has to have them.
class Field {
public:
    Field(const char* name, const nb::ndarray<nb::ro>& a, size_t dimensions)
        : data((const int32_t*)a.data()), name_(name) {
        if (a.dtype() != nb::dtype<int32_t>() || a.device_type() != nb::device::cpu::value)
            refuse(std::string(name) + ": expected int32, got another type");
        if (a.ndim() != dimensions)
            refuse(std::string(name) + ": expected " + std::to_string(dimensions) +
                   " dimensions, got " + std::to_string(a.ndim()));
        int64_t step = 1;
        for (size_t i = dimensions; i-- > 0;) {
            if (a.shape(i) > 1 && a.stride(i) != step && a.size() > 0)
                refuse(std::string(name) + ": expected a contiguous array, got strides");
            step *= (int64_t)a.shape(i);
            shape[i] = a.shape(i);
        }
        size = a.size();
    }

    void within(int64_t limit) const {
        for (size_t i = 0; i < size; ++i)
            if (data[i] < 0 || data[i] >= limit)
                refuse(std::string(name_) + ": expected 0 to " + std::to_string(limit - 1) +
                       ", got " + std::to_string(data[i]));
    }

    const int32_t* data;
    size_t shape[2] = {1, 1}, size = 0;

private:
    const char* name_;
};

void check(const Field& positions, const Field& sequence, size_t sequences) {
    std::vector<bool> ended(sequences);
    for (size_t i = 1; i < sequence.size; ++i) {
        const int32_t before = sequence.data[i - 1];
        if (sequence.data[i] != before) {
            ended[before] = true;
            if (ended[sequence.data[i]]) refuse("sequence: expected its tokens together");
        } else if (positions.data[i] != positions.data[i - 1] + 1) {
            refuse("positions: expected " + std::to_string(positions.data[i - 1] + 1) +
                   " next in the sequence, got " + std::to_string(positions.data[i]));
        }
    }
}

void check_states(const Field& states, size_t sequences, int64_t limit) {
    if (states.size != sequences)
        refuse("states: expected one for each sequence");
    states.within(limit);
    std::vector<bool> taken(limit);
    for (size_t s = 0; s < states.size; ++s) {
        if (taken[states.data[s]]) refuse("states: expected each once");
        taken[states.data[s]] = true;
    }
}

using Given = nb::ndarray<nb::ro>;

// limits: ids, positions, pages, states (0: the model has none).
void check_batch(const Given& tokens, const Given& positions, const Given& sequence,
                 const Given& pages, const Given& logit_rows, const std::optional<Given>& states,
                 const std::tuple<int64_t, int64_t, int64_t, int64_t>& limits) {
    const auto& [n_ids, n_positions, n_pages, n_states] = limits;
    const Field t("tokens", tokens, 1), p("positions", positions, 1), s("sequence", sequence, 1);
    const Field table("pages", pages, 2), rows("logit_rows", logit_rows, 1);
    if (t.size == 0 || p.size != t.size || s.size != t.size)
        refuse("tokens: expected at least one, and as many positions and sequences");
    t.within(n_ids);
    s.within((int64_t)table.shape[0]);
    p.within(std::min(n_positions, (int64_t)table.shape[1] * KV_PAGE));
    table.within(n_pages);
    rows.within((int64_t)t.size);
    check(p, s, table.shape[0]);
    if (n_states && states) check_states(Field("states", *states, 1), table.shape[0], n_states);
    if (n_states && !states && (int64_t)table.shape[0] > n_states)
        refuse("states: expected at most " + std::to_string(n_states) + " sequences");
}

}  // namespace

void bind_batch(nb::module_& m) {
    m.def("check_batch", &check_batch, nb::arg("tokens"), nb::arg("positions"),
          nb::arg("sequence"), nb::arg("pages"), nb::arg("logit_rows"), nb::arg("states").none(),
          nb::arg("limits"));
}
