// A matrix unit's registers: eight tiles of up to 16 rows of 64 bytes. Amx is Intel's, its instructions
// written out, so that neither compiler nor flags must know them; EmulatedAmx does what they do (Intel's
// Software Developer's Manual, volume 2) where a machine has none. Only for tests.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "kernels.h"

namespace isobit::ISOBIT_SIMD {

// Tokens of a product are multiplied so many at a time: all alike, so that no tile is nearly empty.
constexpr int TILE_ROWS = 16;
FN constexpr int tokens_at_once(int n) {
    const int tiles = (n + TILE_ROWS - 1) / TILE_ROWS;
    return (n + tiles - 1) / tiles;
}

// Tiles 0 to 3 hold sums of a row of each token, 4 and 5 values of as many tokens, 6 and 7 four values each
// of 16 weight rows.
constexpr int FIRST_WEIGHTS = 6;

struct Amx {
    // While it lives, this thread's tiles are there, for so many tokens.
    struct Use {
        explicit INLINE Use(int tokens) {
            struct alignas(64) {
                uint8_t palette = 1, start = 0, reserved[14] = {};
                uint16_t row_bytes[16] = {};
                uint8_t rows[16] = {};
            } shape;
            for (int t = 0; t < 8; ++t) {
                shape.row_bytes[t] = 64;
                shape.rows[t] = (uint8_t)(t < FIRST_WEIGHTS ? tokens : TILE_ROWS);
            }
            asm volatile("ldtilecfg %0" : : "m"(shape));
        }
        INLINE ~Use() { asm volatile("tilerelease"); }
    };

    template <int t>
    FN void clear() {
        asm volatile("tilezero %%tmm%c0" : : "i"(t));
    }
    template <int t>
    FN void load(const void* from, size_t stride) {
        asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(t) : "memory");
    }
    template <int t>
    FN void store(void* to, size_t stride) {
        asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(t) : "memory");
    }
    // Sums of signed values of tokens times weights.
    template <int sums, int tokens, int weights, bool signed_weights>
    FN void dot() {
        if constexpr (signed_weights)
            asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(sums), "i"(tokens), "i"(weights));
        else
            asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(sums), "i"(tokens), "i"(weights));
    }
};

struct EmulatedAmx {
    struct Registers {
        int tokens;  // 0: not configured, and every instruction an illegal one
        alignas(64) uint8_t bytes[8][TILE_ROWS][64];
    };
    static inline thread_local Registers registers;

    struct Use {
        explicit Use(int tokens) {
            memset(&registers, 0, sizeof registers);
            registers.tokens = tokens;
        }
        ~Use() { registers.tokens = 0; }
    };

    FN int rows(int t) {
        if (registers.tokens < 1 || registers.tokens > TILE_ROWS) __builtin_trap();
        return t < FIRST_WEIGHTS ? registers.tokens : TILE_ROWS;
    }
    template <int t>
    FN void clear() {
        memset(registers.bytes[t], 0, 64 * rows(t));
    }
    template <int t>
    FN void load(const void* from, size_t stride) {
        memset(registers.bytes[t], 0, sizeof registers.bytes[t]);
        for (int r = 0; r < rows(t); ++r) memcpy(registers.bytes[t][r], (const char*)from + r * stride, 64);
    }
    template <int t>
    FN void store(void* to, size_t stride) {
        for (int r = 0; r < rows(t); ++r) memcpy((char*)to + r * stride, registers.bytes[t][r], 64);
    }
    template <int sums, int tokens, int weights, bool signed_weights>
    FN void dot() {
        if constexpr (signed_weights)
            add_products<int8_t>(sums, tokens, weights);
        else
            add_products<uint8_t>(sums, tokens, weights);
    }

    template <class Weight>
    APART void add_products(int sums, int tokens, int weights) {
        const Registers& r = registers;
        uint32_t all[TILE_ROWS][16], w[64][16];  // which wrap around
        memcpy(all, r.bytes[sums], sizeof all);
        for (int k = 0; k < 64; ++k)
            for (int n = 0; n < 16; ++n) w[k][n] = (uint32_t)(Weight)r.bytes[weights][k / 4][4 * n + k % 4];
        for (int m = 0, end = rows(sums); m < end; ++m)
            for (int k = 0; k < 64; ++k)
                for (int n = 0; n < 16; ++n) all[m][n] += (uint32_t)(int8_t)r.bytes[tokens][m][k] * w[k][n];
        memcpy(registers.bytes[sums], all, sizeof all);
    }
};

}  // namespace isobit::ISOBIT_SIMD
