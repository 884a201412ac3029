// What the parts of the Python module share.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <string>

#include "../engine/matmul.h"

namespace nb = nanobind;

template <class T, int N>
using Array = nb::ndarray<T, nb::ndim<N>, nb::c_contig, nb::device::cpu>;
template <class T, int N>
using Input_ = Array<const T, N>;

inline void require(bool good, const char* message) {
    if (!good) throw std::invalid_argument(message);
}

inline const isobit::Kernels& kernels_named(const std::string& simd) {
    const isobit::Kernels* k = isobit::find_kernels(simd.empty() ? nullptr : simd.c_str());
    if (!k) throw std::invalid_argument("simd: this machine or build has no level " + simd);
    return *k;
}

// A matrix, or a stack of them, and the array that owns its bytes.
struct PyMatrix {
    isobit::Matrix m;
    Input_<uint8_t, 1> owner;

    PyMatrix(Input_<uint8_t, 1> data, int type, int stack, int rows, int columns, size_t row_bytes)
        : m{data.data(), type, rows, columns, row_bytes}, owner(data) {
        require(stack > 0 && rows > 0 && columns > 0, "Matrix: expected a positive shape");
        require(data.size() == (size_t)stack * rows * row_bytes, "Matrix: wrong number of bytes");
        require(isobit::usable_kernels(0)->matmul(type, 2), "Matrix: unknown format");
    }
};

void bind_batch(nb::module_& m);
void bind_bus(nb::module_& m);
void bind_loading(nb::module_& m);
void bind_engine(nb::module_& m);
void bind_sampler(nb::module_& m);
