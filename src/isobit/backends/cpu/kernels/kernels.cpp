// One SIMD level: compiled once for each, with that level's flags and ISOBIT_LEVEL naming its
// header. Includes no C++ library, whose inline functions the linker would share between levels.

#include "kernels.h"

#include <string.h>

#include "scalar.h"

#include ISOBIT_LEVEL

#include "formats.h"
#include "pointwise.h"

#include "matmul.h"

#include "attention.h"
#include "embedding.h"
#include "delta.h"
#include "moe.h"
#include "sampling.h"

namespace isobit::ISOBIT_SIMD {

#define ISOBIT_INFO(Format) {#Format, Format::id, Format::block, Format::bytes},
static const FormatInfo formats[] = {ISOBIT_QUANTISED(ISOBIT_INFO){nullptr, 0, 0, 0}};

extern const Kernels kernels;
const Kernels kernels = {
    ISOBIT_SIMD_NAME, LANES, matmul, dequantise, quantise, quantise_head, rms_norm, rope, exp,
    silu_gate, clamped_gate, add, top_k, combine, silu, sigmoid, sigmoid_gate, gated_add, l2_norm, decay,
    causal_conv, delta, largest, weigh, sum_above, store, attention, formats,
};

}  // namespace isobit::ISOBIT_SIMD
