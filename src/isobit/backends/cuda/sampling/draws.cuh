// What decides a token beside the logits: section 10 of docs/numerics.md.
#pragma once
#include "common.cuh"

struct Draw {  // also known to sampler.py
    int row;
    float temperature;
    int top_k;       // 0: all
    uint32 min_p;    // its bits
    uint64 top_p;    // times 2^64; 0: all
    uint64 seed;
    uint64 index;    // of the token in its output, from 1
    float repetition, presence, frequency;
    int mask;        // the number of the one that it is held to, or -1
};
