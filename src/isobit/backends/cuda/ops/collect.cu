// What the other parts of a split model have sent of a value's rows, to where this part's columns lie.
#include "exchange.cuh"

// A column of a row a thread.
KERNEL(THREADS) collect(float* x, const uint64* exchanges, int site) {
    Exchange<Cut> exchange(exchanges, site);
    begin();
    int column = blockIdx.x * THREADS + threadIdx.x, part = Cut::part_of(column);
    if (column >= Cut::WHOLE || part == exchange.rank) return;
    int64 at = exchange.at(blockIdx.y, 0) + column;
    x[int64(blockIdx.y) * Cut::WHOLE + column] = exchange.value(read_word(exchange.mine + at), part, at);
}
