// Digests of rows of logits: isobit.numerics.digest.
#pragma once

#include <vector>

#include "../kernels/kernels.h"

namespace isobit {

class TreeDigest {
public:
    explicit TreeDigest(const Kernels& kernels) : kernels_(kernels) {}
    void operator()(const uint8_t* data, size_t bytes, uint8_t* out);

private:
    const Kernels& kernels_;
    std::vector<uint8_t> levels_[2];
};

}  // namespace isobit
