// The KV cache in fixed point, and attention over it: docs/numerics.md, section 6.
#pragma once

#include "../kernels/kernels.h"

namespace isobit {

constexpr int QUERY_BLOCK = 4;  // query vectors that share one pass over the keys

// A head's keys and values of one page, in the order in which the kernels read them. D is head_dim
// rounded up to 16; k is [4][D/2][16 keys][2 dims], v is [D/16][32 key pairs][16 dims][2 keys].
struct PageLayout {
    int head_dim;
    int padded;    // D
    size_t bytes;  // dk[64], dv[64], k, v
};
FN PageLayout page_layout(int head_dim) {
    int padded = (head_dim + 15) / 16 * 16;
    return {head_dim, padded, 2 * KV_PAGE * (sizeof(float) + sizeof(int16_t) * padded)};
}
FN float* page_dk(uint8_t* page) { return (float*)page; }
FN float* page_dv(uint8_t* page) { return page_dk(page) + KV_PAGE; }
FN int16_t* page_k(uint8_t* page) { return (int16_t*)(page_dv(page) + KV_PAGE); }
FN int16_t* page_v(const PageLayout& p, uint8_t* page) { return page_k(page) + KV_PAGE * p.padded; }

struct Query {
    const int16_t* q;  // padded with zeros to PageLayout::padded
    float d;           // times attention_scale(head_dim)
    int first, position;  // it sees the keys from first to its position
    const float* sink;    // what joins the softmax without a value; may be null
    float* out;  // head_dim values
};

// The pages of one key-value head: page t of the sequence is base + table[t] * stride.
struct Pages {
    uint8_t* base;
    size_t stride;
    const int32_t* table;
};

// A key and a value put into a page.
template <Level>
struct Store {
    static void run(const PageLayout&, uint8_t* page, int slot, const int16_t* k, float dk,
                    const int16_t* v, float dv);
};

// Query vectors of one key-value head over its pages.
template <Level>
struct Attend {
    static void run(const PageLayout&, const Pages&, const Query* queries, int n);
};

}  // namespace isobit
