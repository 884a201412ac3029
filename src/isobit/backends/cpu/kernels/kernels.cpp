// One SIMD level: compiled once for each.

#include "level.h"

#include "formats.h"
#include "few_bits_iq.h"
#include "few_bits_ternary.h"

#include "floats.h"
#include "tile.h"
#include "matmul.h"

#include "embedding.h"

namespace isobit::ISOBIT_SIMD {

static const FormatInfo formats[] = {
#define ISOBIT_INFO(Format) {#Format, Format::id, Format::block, Format::bytes},
    ISOBIT_QUANTISED(ISOBIT_INFO)
#undef ISOBIT_INFO
#define ISOBIT_INFO(Format) {#Format, Format::id, Format::block, Format::bytes},
        ISOBIT_FEW_BITS(ISOBIT_INFO){"NVFP4", NVFP4::id, NVFP4::block, NVFP4::bytes}, {nullptr, 0, 0, 0}};

#define ISOBIT_KERNELS(stream)                                                                    \
    {ISOBIT_SIMD_NAME, LEVEL, LANES, WORDS, matmul<stream>, dequantise, quantise, quantise_head,       \
     silu_gate, add, formats}

extern const Kernels kernels;
const Kernels kernels = ISOBIT_KERNELS(false);
#ifdef ISOBIT_STREAMS
extern const Kernels streaming;
const Kernels streaming = ISOBIT_KERNELS(true);
#endif

}  // namespace isobit::ISOBIT_SIMD
