// The tokens of a batch as chunks: those of one sequence, in order.
#pragma once
#include "common.cuh"

struct SequenceChunk {
    int first, count;  // tokens of the batch
    int state;         // where what is kept of the sequence lies
    int unused;
};
