// What a SIMD level offers: one table of functions, the same for every level. Raw buffers in, raw
// buffers out; nothing here knows a model or a thread. Arithmetic: docs/numerics.md.
#pragma once

#include <stddef.h>
#include <stdint.h>

// Always inlined: this header is compiled for several instruction sets, and the linker must not pick
// one of their copies for all.
#define INLINE inline __attribute__((always_inline))
#define FN static INLINE
#define APART static __attribute__((noinline, unused))  // not every file of a level calls all

namespace isobit {

constexpr int SUPERBLOCK = 256;
constexpr int KV_PAGE = 64;             // keys of an attention tile, positions of a KV page
constexpr int MAX_HEAD_DIM = 512;
constexpr int DELTA_COLUMNS = 16;    // of a state that DeltaStep brings forward
constexpr int ROW_STEP = 16;         // every level's lanes divide this many rows
constexpr int FLOAT_ROWS = 4;        // of float weights, which need no tiles
constexpr int TOKEN_BLOCK = 64;      // of a product, which share a superblock as it is unpacked

// One block of 256 activations in fixed point, padded with zeros. Plane 0 holds the high bytes and
// plane 1 the low ones; with one plane, plane 0 holds the integers themselves.
struct alignas(64) Activations {
    int8_t plane[2][SUPERBLOCK];
    int16_t sum16[2][16];  // of each 16 values of a plane
    int16_t sum32[2][8];
    float d;
    const int16_t* words;  // the integers, the middle two of each four exchanged: for dot_words() alone
};

FN constexpr int blocks_of(int columns) { return (columns + SUPERBLOCK - 1) / SUPERBLOCK; }

// y[y_row(i)][n] = sum over k of W[n][k] * x[x_row(i)][k] for i < tokens.
struct Product {
    const uint8_t* w;
    size_t row_bytes;
    int columns;
    const Activations* q;  // x in fixed point, blocks_of(columns) a row: for quantised weights
    const float* x;        // x as it is, columns a row: for float weights
    const int32_t* x_rows;  // null: i
    const int32_t* y_rows;  // null: i
    float* y;
    size_t y_stride;
    int tokens;
    const uint8_t* next = nullptr;  // the weights that this thread reads after these rows
};

// How matrices of one format are multiplied.
struct Matmul {
    void (*f)(const void* format, const Product&, int row_begin, int row_end);
    const void* format;

    INLINE void operator()(const Product& p, int row_begin, int row_end) const {
        f(format, p, row_begin, row_end);
    }
    INLINE operator bool() const { return f; }
};

constexpr int DIGEST_BYTES = 32;     // of SHA-256
constexpr int LOGIT_BLOCK = 256;  // of a row of logits, whose sums and maxima are kept

// A quantised format: ggml's number, values and bytes of a block.
struct FormatInfo {
    const char* name;
    int type, block, bytes;
};

// The SIMD levels of this processor's kind, best first.
enum class Level {
#if defined(__x86_64__)
    avx512vnni, avx2,
#elif defined(__aarch64__)
    neon_i8mm, neon,
#endif
    portable
};

// What a level knows of formats, and what several operations call: products in all formats, activations
// in fixed point, sums of two, SwiGLU. What one operation alone calls is declared, for every level, in the
// operation's own file, which is compiled once for each: see run_of.
struct Kernels {
    const char* name;
    Level level;
    bool words;  // whether products read Activations::words
    Matmul (*matmul)(int ggml_type, int planes);
    void (*dequantise)(int ggml_type, const uint8_t* row, int n, float* out);
    void (*quantise)(const float* x, int n, int planes, Activations* out, int16_t* words);
    void (*quantise_head)(const float* x, int n, int16_t* q, float* d);
    void (*silu_gate)(const float* gate, const float* up, int n, float* y);
    void (*add)(const float* x, const float* y, int n, float* out);
    const FormatInfo* formats;  // every quantised one; then a null name
};

// The function of a level: Kernel<Level>::run, which NAME.simd.cpp defines when it is compiled for one
// (ISOBIT_LEVEL), and calls when it is not.
template <template <Level> class Kernel>
FN auto run_of(const Kernels& kernels) {
    static constexpr decltype(&Kernel<Level::portable>::run) runs[] = {
#if defined(__x86_64__)
        &Kernel<Level::avx512vnni>::run, &Kernel<Level::avx2>::run,
#elif defined(__aarch64__)
        &Kernel<Level::neon_i8mm>::run, &Kernel<Level::neon>::run,
#endif
        &Kernel<Level::portable>::run};
    return runs[(int)kernels.level];
}

// The levels that this build has and this machine can run, best first; null past the last.
const Kernels* usable_kernels(int i);

// Whether this processor has a matrix unit that the system does not let this process use.
bool refused_unit();

// One of them by name; the best if the name is null; null if there is none of that name. Tests ask for
// emulated_amx as well.
const Kernels* find_kernels(const char* name);

}  // namespace isobit
