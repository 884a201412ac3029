// The feed-forward: tokens grouped by expert, each expert's weights read once for all its tokens. A
// dense feed-forward is one expert that every token goes to.
#pragma once

#include <vector>

#include "matmul.h"

namespace isobit {

struct FeedForward {
    Matrix gate, up, down;  // stacks, one matrix for each expert
};

class Experts {
public:
    // Buffers for `tokens` tokens of k experts each.
    void resize(int tokens, int k, int ffn, int hidden);

    // One thread: sorts the slots (token * k + rank) by expert; ids is [tokens, k].
    void group(const int32_t* ids, int experts);

    // Every thread of the team: gate, up, SwiGLU and down for every slot.
    void run(Team& team, const Kernels& kernels, int planes, const FeedForward& w, const Input& x);

    // The sum of a token's experts by rank; weights is [tokens, k].
    void combine(const Kernels& kernels, int token, const float* weights, float* sum) const;

    int tokens = 0, k = 0, ffn = 0, hidden = 0;
    std::vector<float> gate, up, out;  // [tokens, k, ffn or hidden]
    Input swiglu;                      // [tokens * k, ffn]

private:
    struct Group {
        int expert, first, count;
    };
    std::vector<Group> groups_;
    std::vector<int32_t> slots_, tokens_;  // by expert: the slot, and its token
    std::vector<int> first_;
};

}  // namespace isobit
