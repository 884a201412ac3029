#include "grids.h"

namespace isobit {

namespace {

#define ISOBIT_LIST(...) {__VA_ARGS__}
#define GRID(name, width, values, ...)                         \
    constexpr int8_t values_##name[] = ISOBIT_LIST values; \
    constexpr uint16_t rows_##name[] = {__VA_ARGS__};
#include "../../../gguf/grids.h"
#undef GRID

template <class Row, int n, int values>
consteval Grid<Row, n> table(const uint16_t (&rows)[n], const int8_t (&value)[values], int zero) {
    Grid<Row, n> out = {};
    const int bits = values == 8 ? 4 : 2;
    for (int i = 0; i < n; ++i)
        for (int k = 0; k < (int)sizeof(Row); ++k)
            out.row[i] |= (Row)(value[rows[i] >> bits * k & ((1 << bits) - 1)] + zero) << 8 * k;
    return out;
}

}  // namespace

#define ISOBIT_GRID(name, Row, n, zero) \
    const Grid<Row, n> grid_##name = table<Row>(rows_##name, values_##name, zero);
ISOBIT_GRIDS(ISOBIT_GRID)

}  // namespace isobit
