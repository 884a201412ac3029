// The experts that a router's logits choose (docs/numerics.md, section 7), found by every block for itself.
#pragma once
#include "decode.cuh"

#if EXPERTS
struct TopKShared {
    float p[CHOOSING][EXPERTS + 1];
};
// By CHOOSING warps, a definition. Probabilities by each of them, then ranks by counting: an expert's rank is the number of those
// before it. found(rank, expert, p): by one thread each, for the first USED ranks. meanwhile: what is
// done while the logits are on their way. A barrier must follow.
template <class Meanwhile, class Found>
DEV void router_top_k(const float* logits, TopKShared* sh, Meanwhile meanwhile, Found found) {
    constexpr int EACH = (EXPERTS + WARP - 1) / WARP;
    const float lowest = isobit::from_bits(0xff800000u);
    float z[EACH], m = lowest, lanes[8] = {};
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        int e = i * WARP + lane_id();
        z[i] = e < EXPERTS ? logits[e] : lowest;
    }
    meanwhile();
#pragma unroll
    for (int i = 0; i < EACH; i++) m = fmaxf(m, z[i]);
    m = warp_max(m);
#pragma unroll
    for (int i = 0; i < EACH; i++) {  // lane l + 32 (i % 8) of sum256
        z[i] = i * WARP + lane_id() < EXPERTS ? isobit::exp(sub(z[i], m)) : 0.0f;
        lanes[i % 8] = add(lanes[i % 8], z[i]);
    }
    for (int n = 4; n; n /= 2)
        for (int i = 0; i < n; i++) lanes[i] = add(lanes[i], lanes[i + n]);
    float total = warp_tree(lanes[0]);
    float* p = sh->p[warp_id()];
#pragma unroll
    for (int i = 0; i < EACH; i++)
        if (i * WARP + lane_id() < EXPERTS) p[i * WARP + lane_id()] = div(z[i], total);
    __syncwarp();
    // Four lanes count for one expert; a warp takes 8 experts at a time.
    for (int base = warp_id() * 8; base < EXPERTS; base += CHOOSING * 8) {
        int e = base + lane_id() / 4, before = 0;
        float mine = e < EXPERTS ? p[e] : 0.0f;
        // Those before e come first at an equal probability, those behind it only at a larger one.
        uint32 least = bits(mine), larger = least + 1;
#pragma unroll 16
        for (int j = lane_id() % 4; j < EXPERTS; j += 4) before += bits(p[j]) >= (j < e ? least : larger);
        before += shuffle_xor(before, 1);
        before += shuffle_xor(before, 2);
        if (e < EXPERTS && before < USED) found(before, e, mine);
    }
}
// The weight of the expert of that rank, once chosen; p: of all ranks.
DEV float top_k_weight(int rank, int normalise, const float* p) {
    float all = 0.0f;
    for (int r = 0; r < USED; r++) all = add(all, p[r]);
    return normalise ? div(p[rank], all) : p[rank];
}
#endif
