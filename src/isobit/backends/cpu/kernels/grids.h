// The grids of IQ1, IQ2 and IQ3 as bytes, the lowest the first value: one copy for every SIMD level.
#pragma once

#include <stdint.h>

namespace isobit {

constexpr int IQ1_ZERO = 10, IQ2_ZERO = 43, IQ3_XXS_ZERO = 62, IQ3_S_ZERO = 15;  // added to each

#define ISOBIT_GRIDS(X)                                                               \
    X(IQ1, uint64_t, 2048, IQ1_ZERO + 1) /* 1 more, as most want it */                 \
    X(IQ2_XXS, uint64_t, 256, IQ2_ZERO) X(IQ2_XS, uint64_t, 512, IQ2_ZERO)             \
    X(IQ2_S, uint64_t, 1024, IQ2_ZERO) X(IQ3_XXS, uint32_t, 256, IQ3_XXS_ZERO)         \
    X(IQ3_S, uint32_t, 512, IQ3_S_ZERO)

template <class Row, int n>
struct Grid {
    Row row[n];
};

#define ISOBIT_GRID(name, Row, n, zero) \
    extern const Grid<Row, n> grid_##name __attribute__((visibility("hidden")));
ISOBIT_GRIDS(ISOBIT_GRID)
#undef ISOBIT_GRID

}  // namespace isobit
