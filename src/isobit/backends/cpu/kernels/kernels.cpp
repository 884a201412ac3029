// One SIMD level: compiled once for each.

#include "level.h"

#include "formats.h"
#include "few_bits_iq.h"
#include "few_bits_ternary.h"

#include "floats.h"
#include "tile.h"
#include "matmul.h"

#ifdef ISOBIT_AMX
#include "matmul_amx.h"
#endif

#include "embedding.h"

namespace isobit::ISOBIT_SIMD {

static const FormatInfo formats[] = {
#define ISOBIT_INFO(Format) {#Format, Format::id, Format::block, Format::bytes},
    ISOBIT_QUANTISED(ISOBIT_INFO)
#undef ISOBIT_INFO
#define ISOBIT_INFO(Format) {#Format, Format::id, Format::block, Format::bytes},
        ISOBIT_FEW_BITS(ISOBIT_INFO){"NVFP4", NVFP4::id, NVFP4::block, NVFP4::bytes}, {nullptr, 0, 0, 0}};

#define ISOBIT_KERNELS(name, matmul) \
    {name, LEVEL, WORDS, matmul, dequantise, quantise, quantise_head, silu_gate, add, formats}

extern const Kernels kernels;
const Kernels kernels = ISOBIT_KERNELS(ISOBIT_SIMD_NAME, matmul<false>);
#ifdef ISOBIT_STREAMS
extern const Kernels streaming;
const Kernels streaming = ISOBIT_KERNELS(ISOBIT_SIMD_NAME, matmul<true>);
#endif
#ifdef ISOBIT_AMX
extern const Kernels amx, emulated_amx;
const Kernels amx = ISOBIT_KERNELS("avx512amx", matmul_amx<Amx>);
const Kernels emulated_amx = ISOBIT_KERNELS("emulated_amx", matmul_amx<EmulatedAmx>);
#endif

}  // namespace isobit::ISOBIT_SIMD
