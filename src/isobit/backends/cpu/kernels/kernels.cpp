// One SIMD level: compiled once for each, with that level's flags and ISOBIT_LEVEL naming its
// header. Includes no C++ library, whose inline functions the linker would share between levels.

#include "kernels.h"

#include <stddef.h>
#include <string.h>

#include "scalar.h"

#include ISOBIT_LEVEL

#include "decode.h"
#include "formats.h"
#include "pointwise.h"

#include "floats.h"
#include "tile.h"
#include "matmul.h"

#include "attention.h"
#include "embedding.h"
#include "delta.h"
#include "moe.h"
#include "sampling.h"

namespace isobit::ISOBIT_SIMD {

static const FormatInfo formats[] = {
#define ISOBIT_INFO(Format) {#Format, Format::id, Format::block, Format::bytes},
    ISOBIT_QUANTISED(ISOBIT_INFO)
#undef ISOBIT_INFO
#define ISOBIT_INFO(F) {decoded_##F.name, decoded_##F.type, decoded_##F.block, decoded_##F.bytes},
        ISOBIT_DECODED(ISOBIT_INFO){"NVFP4", NVFP4::id, NVFP4::block, NVFP4::bytes}, {nullptr, 0, 0, 0}};

#define ISOBIT_KERNELS(stream)                                                                    \
    {ISOBIT_SIMD_NAME, LANES, matmul<stream>, dequantise, quantise, quantise_head, rms_norm, rope,  \
     exp, silu_gate, clamped_gate, gelu_gate, softcap, add, top_k, combine, silu, sigmoid,          \
     sigmoid_gate, gated_add, l2_norm, decay, causal_conv, delta, largest, weigh, sum_above, store, attention, formats}

extern const Kernels kernels;
const Kernels kernels = ISOBIT_KERNELS(false);
#ifdef ISOBIT_STREAMS
extern const Kernels streaming;
const Kernels streaming = ISOBIT_KERNELS(true);
#endif

}  // namespace isobit::ISOBIT_SIMD
