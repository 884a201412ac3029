// The Python module isobit.backends.cpu._cpu. Every array is C-contiguous; outputs are written in place.

#include "module.h"

#include <nanobind/stl/tuple.h>

#include <tuple>

#include "../engine/threads.h"

using namespace isobit;

NB_MODULE(_cpu, m) {
    nb::set_leak_warnings(false);  // what is alive at the interpreter's end is no leak
    m.def("simd_levels", [] {
        std::vector<std::string> names;
        for (int i = 0; const Kernels* k = usable_kernels(i); ++i) names.push_back(k->name);
        return names;
    });
    m.def("refused_unit", &refused_unit);
    m.def("formats", [] {
        std::vector<std::tuple<std::string, int, int, int>> all;
        for (const FormatInfo* f = usable_kernels(0)->formats; f->name; ++f)
            all.emplace_back(f->name, f->type, f->block, f->bytes);
        return all;
    });
    // In nanoseconds, for tests.
    nb::class_<TeamSize>(m, "TeamSize")
        .def(nb::init<int>())
        .def("members", &TeamSize::members)
        .def("ran", [](TeamSize& size, int64_t took, int64_t busy, double work) {
            size.ran(TeamSize::Duration(took), TeamSize::Duration(busy), work);
        });
    nb::class_<PyMatrix>(m, "Matrix")
        .def(nb::init<Input_<uint8_t, 1>, int, int, int, int, size_t>());
    bind_batch(m);
    bind_bus(m);
    bind_loading(m);
    bind_engine(m);
    bind_sampler(m);
}
