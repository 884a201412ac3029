// The logits that a draw is from, where they are not the model's: section 10 of docs/numerics.md. Copies, as
// log-probabilities and digests are of the logits as they were.
#include "draws.cuh"
#include "logprobs.cuh"

constexpr uint32 OCCURRED = 0x80000000u;

struct Edit {  // ADJUSTED of backends/base/draws.py
    int draw, id;
    float bias;
    uint32 seen;  // how often it is in the output; OCCURRED: it is there or in the prompt
};

DEV bool allowed(const Draw& draw, const uint32* masks, int words, int id) {
    return draw.mask < 0 || masks[int64(draw.mask) * words + id / 32] >> (id % 32) & 1u;
}

// Rows of n logits, one for each draw: minus infinity where its mask, of so many words, forbids an id. What is not
// finite becomes a NaN, forbidden or not: it tells that the row is broken.
KERNEL(256) copied(const Draw* draws, const float* logits, int n, const uint32* masks, int words, float* edited) {
    begin();
    const Draw draw = draws[blockIdx.y];
    for (int j = 0; j < EACH; j++) {
        int i = blockIdx.x * PIECE + j * BLOCK + threadIdx.x;
        if (i >= n) continue;
        const float z = logits[int64(draw.row) * n + i];
        const uint32 other = magnitude(z) >= 0x7f800000u ? 0x7fc00000u : 0xff800000u;
        const bool stays = other == 0xff800000u && allowed(draw, masks, words, i);
        edited[int64(blockIdx.y) * n + i] = stays ? z : isobit::from_bits(other);
    }
}

// Bias and penalties, each id of a draw once. A forbidden id, or one of a broken row, stays as it was copied.
KERNEL(256) adjusted(const Draw* draws, const Edit* edits, int count, const float* logits, int n, const uint32* masks,
                     int words, float* edited) {
    begin();
    int i = blockIdx.x * BLOCK + threadIdx.x;
    if (i >= count) return;
    const Edit edit = edits[i];
    const Draw draw = draws[edit.draw];
    float z = logits[int64(draw.row) * n + edit.id];
    if (magnitude(z) >= 0x7f800000u || !allowed(draw, masks, words, edit.id)) return;
    z = add(z, edit.bias);
    if (draw.repetition != 1.0f && edit.seen & OCCURRED)
        z = z > 0.0f ? div(z, draw.repetition) : mul(z, draw.repetition);
    int times = int(edit.seen & ~OCCURRED);
    if (times) z = sub(sub(z, mul(draw.frequency, float(times))), draw.presence);
    const float most = isobit::from_bits(0x7f7fffffu);
    edited[int64(edit.draw) * n + edit.id] = z > most ? most : z < -most ? -most : z;
}
