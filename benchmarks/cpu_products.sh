#!/bin/sh
# Compiles cpu_products.cpp for this machine, in seconds, and runs it on processors from the first to
# the last given: sh benchmarks/cpu_products.sh 0 15
set -e
cd "$(dirname "$0")/.."
kernels=src/isobit/backends/cpu/kernels
to=$(mktemp -d)
compile="g++ -std=gnu++20 -ffp-contract=off -fno-math-errno -fno-trapping-math -fno-tree-reassoc
  -fno-tree-ter -w -Isrc/isobit/numerics -I$kernels"
$compile -O1 -DISOBIT_LEVEL='"simd_portable.h"' -c $kernels/kernels.cpp -o "$to/portable.o" &
$compile -O1 -c $kernels/grids.cpp -o "$to/grids.o" &
$compile -O3 -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni -mf16c \
  -DISOBIT_LEVEL='"simd_avx512.h"' -c benchmarks/cpu_products.cpp -o "$to/products.o"
wait
g++ "$to/products.o" "$to/portable.o" "$to/grids.o" -lpthread -o "$to/products"
"$to/products" "${1:-0}" "${2:-15}"
rm -r "$to"
