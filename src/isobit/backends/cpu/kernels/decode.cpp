// Superblocks of the formats of decode.h, as bytes.

#include "decode.h"

#include <string.h>

#include "scalar.h"

namespace isobit {

namespace {

constexpr uint64_t ONES = 0x0101010101010101;

#define ISOBIT_LIST(...) {__VA_ARGS__}
#define GRID(name, width, values, ...)                       \
    constexpr int8_t name##_values[] = ISOBIT_LIST values; \
    constexpr uint16_t name##_rows[] = {__VA_ARGS__};
#include "../../../gguf/grids.h"
#undef GRID

// A grid's rows as bytes, the lowest the first value, `zero` added to each.
template <class Row, int n>
struct Grid {
    Row row[n];

    template <int values>
    constexpr Grid(const uint16_t (&rows)[n], const int8_t (&value)[values], int zero) : row{} {
        const int bits = values == 8 ? 4 : 2;
        for (int i = 0; i < n; ++i)
            for (int k = 0; k < (int)sizeof(Row); ++k)
                row[i] |= (Row)(value[rows[i] >> bits * k & ((1 << bits) - 1)] + zero) << 8 * k;
    }
    Row operator[](int i) const { return row[i]; }
};

#define ISOBIT_GRID(Row, name, zero) \
    constexpr Grid<Row, sizeof name##_rows / 2> name(name##_rows, name##_values, zero);
ISOBIT_GRID(uint64_t, IQ1, NARROW)
ISOBIT_GRID(uint64_t, IQ2_XXS, WIDE)
ISOBIT_GRID(uint64_t, IQ2_XS, WIDE)
ISOBIT_GRID(uint64_t, IQ2_S, WIDE)
ISOBIT_GRID(uint32_t, IQ3_XXS, WIDE)
ISOBIT_GRID(uint32_t, IQ3_S, NARROW)
#undef ISOBIT_GRID

constexpr uint64_t SHIFTS[2] = {ONES, -ONES};  // of IQ1's codes

// Bit i of a byte as byte i: 0 or 255.
struct Masks {
    uint64_t eight[256], seven[128];  // of seven bits, and an eighth that makes their number even

    constexpr Masks() : eight{}, seven{} {
        for (int byte = 0; byte < 256; ++byte)
            for (int i = 0; i < 8; ++i)
                if (byte >> i & 1) eight[byte] |= (uint64_t)255 << 8 * i;
        for (int byte = 0; byte < 128; ++byte)
            seven[byte] = eight[byte | (__builtin_popcount(byte) & 1) << 7];
    }
};
constexpr Masks MASKS;

uint16_t word16(const uint8_t* p) {
    uint16_t x;
    memcpy(&x, p, 2);
    return x;
}

uint32_t word32(const uint8_t* p) {
    uint32_t x;
    memcpy(&x, p, 4);
    return x;
}

void put(uint8_t* out, uint64_t eight) { memcpy(out, &eight, 8); }

// Codes of a grid, those where the mask is set negated.
template <int zero>
void put_signed(uint8_t* out, uint64_t codes, uint64_t mask) {
    const uint64_t negated = 2 * zero * ONES - codes;
    put(out, codes ^ ((codes ^ negated) & mask));
}

void put_scales(Decoded& out, int group, int two) {  // of 32 values
    out.scales[2 * group] = out.scales[2 * group + 1] = (int8_t)two;
}

uint64_t pair(uint32_t low, uint32_t high) { return low | (uint64_t)high << 32; }

}  // namespace

void decode_IQ2_XXS(const uint8_t* b, Decoded& out) {
    out.d[0] = half_value(b) / 8;
    for (int g = 0; g < 8; ++g) {
        const uint8_t* q = b + 2 + 8 * g;
        const uint32_t w = word32(q + 4);
        for (int i = 0; i < 4; ++i)
            put_signed<WIDE>(out.codes + 32 * g + 8 * i, IQ2_XXS[q[i]],
                             MASKS.seven[w >> 7 * i & 127]);
        put_scales(out, g, 2 * (w >> 28) + 1);
    }
}

void decode_IQ2_XS(const uint8_t* b, Decoded& out) {
    out.d[0] = half_value(b) / 8;
    for (int i = 0; i < 32; ++i) {
        const int q = word16(b + 2 + 2 * i);
        put_signed<WIDE>(out.codes + 8 * i, IQ2_XS[q & 511], MASKS.seven[q >> 9]);
    }
    for (int g = 0; g < 16; ++g) out.scales[g] = 2 * (b[66 + g / 2] >> g % 2 * 4 & 15) + 1;
}

void decode_IQ2_S(const uint8_t* b, Decoded& out) {
    out.d[0] = half_value(b) / 8;
    for (int i = 0; i < 32; ++i)
        put_signed<WIDE>(out.codes + 8 * i, IQ2_S[b[2 + i] | (b[66 + i / 4] >> i % 4 * 2 & 3) << 8],
                         MASKS.eight[b[34 + i]]);
    for (int g = 0; g < 16; ++g) out.scales[g] = 2 * (b[74 + g / 2] >> g % 2 * 4 & 15) + 1;
}

void decode_IQ3_XXS(const uint8_t* b, Decoded& out) {
    out.d[0] = half_value(b) / 4;
    for (int g = 0; g < 8; ++g) {
        const uint8_t* q = b + 2 + 8 * g;
        const uint32_t w = word32(b + 66 + 4 * g);
        for (int i = 0; i < 4; ++i)
            put_signed<WIDE>(out.codes + 32 * g + 8 * i,
                             pair(IQ3_XXS[q[2 * i]], IQ3_XXS[q[2 * i + 1]]),
                             MASKS.seven[w >> 7 * i & 127]);
        put_scales(out, g, 2 * (w >> 28) + 1);
    }
}

void decode_IQ3_S(const uint8_t* b, Decoded& out) {
    out.d[0] = half_value(b);
    for (int g = 0; g < 8; ++g) {
        const uint8_t *q = b + 2 + 8 * g, *signs = b + 74 + 4 * g;
        const int high = b[66 + g];
        auto row = [&](int i) { return IQ3_S[q[i] | (high >> i & 1) << 8]; };
        for (int i = 0; i < 4; ++i)
            put_signed<NARROW>(out.codes + 32 * g + 8 * i, pair(row(2 * i), row(2 * i + 1)),
                               MASKS.eight[signs[i]]);
        put_scales(out, g, 2 * (b[106 + g / 2] >> g % 2 * 4 & 15) + 1);
    }
}

void decode_IQ1_S(const uint8_t* b, Decoded& out) {
    out.d[0] = half_value(b) / 8;
    for (int g = 0; g < 8; ++g) {
        const int h = word16(b + 34 + 2 * g);
        const uint64_t shift = SHIFTS[h >> 15];
        for (int i = 0; i < 4; ++i)
            put(out.codes + 32 * g + 8 * i, IQ1[b[2 + 4 * g + i] | (h >> 3 * i & 7) << 8] + shift);
        put_scales(out, g, 2 * (h >> 12 & 7) + 1);
    }
}

void decode_IQ1_M(const uint8_t* b, Decoded& out) {
    uint8_t d[2];
    for (int i = 0; i < 2; ++i) d[i] = b[49 + 4 * i] >> 4 | (b[51 + 4 * i] & 0xf0);
    out.d[0] = half_value(d) / 8;
    for (int g = 0; g < 8; ++g) {
        const int four = word16(b + 32 + 2 * g);
        for (int i = 0; i < 4; ++i) {
            const int h = four >> 4 * i;
            put(out.codes + 32 * g + 8 * i, IQ1[b[4 * g + i] | (h & 7) << 8] + SHIFTS[h >> 3 & 1]);
        }
    }
    for (int g = 0; g < 16; ++g)
        out.scales[g] = 2 * (word16(b + 48 + g / 4 * 2) >> g % 4 * 3 & 7) + 1;
}

void decode_TQ1_0(const uint8_t* b, Decoded& out) {
    uint8_t* codes = out.codes;
    auto digits = [&](const uint8_t* bytes, int width, int n) {
        for (int k = 0, power = 1; k < n; ++k, power *= 3)
            for (int i = 0; i < width; ++i)
                *codes++ = ((uint8_t)(bytes[i] * power) * 3 >> 8) + NARROW - 1;
    };
    digits(b, 32, 5);
    digits(b + 32, 16, 5);
    digits(b + 48, 4, 4);
    memset(out.scales, 1, sizeof out.scales);
    out.d[0] = half_value(b + 52);
}

void decode_TQ2_0(const uint8_t* b, Decoded& out) {
    for (int run = 0; run < 2; ++run)
        for (int k = 0; k < 4; ++k)
            for (int i = 0; i < 32; ++i)
                out.codes[128 * run + 32 * k + i] = (b[32 * run + i] >> 2 * k & 3) + NARROW - 1;
    memset(out.scales, 1, sizeof out.scales);
    out.d[0] = half_value(b + 64);
}

void decode_Q1_0(const uint8_t* b, Decoded& out) {
    for (int part = 0; part < 2; ++part, b += 18) {
        out.d[part] = half_value(b);
        for (int i = 0; i < 16; ++i)  // 1 or -1
            put(out.codes + 128 * part + 8 * i,
                (MASKS.eight[b[2 + i]] & 2 * ONES) + (NARROW - 1) * ONES);
    }
    memset(out.scales, 1, sizeof out.scales);
}

void decode_Q2_0(const uint8_t* b, Decoded& out) {
    for (int part = 0; part < 4; ++part, b += 18) {
        out.d[part] = half_value(b);
        for (int i = 0; i < 16; ++i) {
            const uint32_t q = b[2 + i];  // its bit pairs, each to a byte
            const uint32_t four = (q | q << 6 | q << 12 | q << 18) & 0x03030303;
            const uint32_t codes = four + (NARROW - 1) * (uint32_t)ONES;
            memcpy(out.codes + 64 * part + 4 * i, &codes, 4);
        }
    }
    memset(out.scales, 1, sizeof out.scales);
}

}  // namespace isobit
