#!/bin/sh
# Compiles cpu_products.cpp for this machine, in seconds, and runs it on the processors given:
# sh benchmarks/cpu_products.sh 0-15
set -e
cd "$(dirname "$0")/.."
kernels=src/isobit/backends/cpu/kernels
to=$(mktemp -d)
compile="g++ -std=gnu++20 -ffp-contract=off -fno-math-errno -fno-trapping-math -fno-tree-reassoc
  -fno-tree-ter -Isrc/isobit/numerics -I$kernels"
$compile -O1 -w -DISOBIT_LEVEL='"simd_portable.h"' -c $kernels/kernels.cpp -o "$to/portable.o" &
$compile -O3 -w -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni -mf16c \
  -DISOBIT_LEVEL='"simd_avx512.h"' -c benchmarks/cpu_products.cpp -o "$to/products.o"
wait
g++ "$to/products.o" "$to/portable.o" -x c++ $kernels/grids.cpp -lpthread -o "$to/products"
taskset -c "${1:-0-15}" "$to/products"
rm -r "$to"
