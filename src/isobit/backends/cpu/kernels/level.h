// What every file needs that is compiled once for each SIMD level, with that level's flags and
// ISOBIT_LEVEL naming its header. Such a file includes no C++ library, whose inline functions the linker
// would share between levels.
#pragma once

#include "kernels.h"

#include <stddef.h>
#include <string.h>

#include "scalar.h"

#include ISOBIT_LEVEL

namespace isobit {
constexpr Level LEVEL = Level::ISOBIT_SIMD;
namespace ISOBIT_SIMD {
#ifdef ISOBIT_WORDS
constexpr bool WORDS = true;  // codes of eight bits in blocks of 32 values are multiplied with whole activations
#else
constexpr bool WORDS = false;
FN I dot_words(I sum, U, const int16_t*) { return sum; }
#endif
#ifndef ISOBIT_ADD_PAIRS  // sum + madd(a, b) in one
FN I add_pairs(I sum, U a, U b) { return sum + madd(a, b); }
#endif
FN F to_float(I v) { return __builtin_convertvector(v, F); }
}
}

#include "pointwise.h"
