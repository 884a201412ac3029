// The experts that a router's logits choose (docs/numerics.md, section 7), found by every block for itself.
#pragma once
#include "decode.cuh"

#if EXPERTS
struct TopKShared {
    float p[EXPERTS];
    int expert[WARP];  // candidates, in ascending order
    uint32 of[WARP];   // the bits of p of each
};
// By one warp. logits: from the lane's first on. likely: USED experts, none twice; the more of them are chosen, the fewer
// are compared. found(rank, expert, p): by one lane each, for the first USED ranks. A barrier must follow.
template <class Found>
DEV void router_top_k(const float* logits, const int* likely, TopKShared* sh, Found found) {
    static_assert(USED <= WARP, "decode_layer.py asks for it");
    constexpr int EACH = (EXPERTS + WARP - 1) / WARP;
    const float lowest = isobit::from_bits(0xff800000u);
    float z[EACH], m = lowest, lanes[8] = {};
    int one = lane_id() < USED ? likely[lane_id()] : 0;
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        int e = i * WARP + lane_id();
        z[i] = e < EXPERTS ? logits[i * WARP] : lowest;
    }
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
    uint32 p[EACH];
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        int e = i * WARP + lane_id();
        float of = div(z[i], total);
        p[i] = bits(of);
        if (e < EXPERTS) sh->p[e] = of;
    }
    __syncwarp();
    // USED experts, none twice, have at least the least of the likely ones' probabilities, so none with less is chosen.
    uint32 least = ~warp_max(lane_id() < USED ? ~bits(sh->p[one]) : 0u);
    int n = 0;
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        int e = i * WARP + lane_id();
        bool is = e < EXPERTS && p[i] >= least;
        uint32 all = __ballot_sync(~0u, is);
        int at = n + __popc(all & (1u << lane_id()) - 1);
        if (is && at < WARP) sh->expert[at] = e, sh->of[at] = p[i];
        n += __popc(all);
    }
    __syncwarp();
    if (n <= WARP) {
        uint32 mine = sh->of[lane_id()];
        int before = 0;
        // Those ahead in the list come first at an equal probability.
#pragma unroll 8
        for (int j = 0; j < n; j++) before += sh->of[j] >= mine + (j >= lane_id());
        if (lane_id() < n && before < USED) found(before, sh->expert[lane_id()], isobit::from_bits(mine));
        return;
    }
    uint32 taken = 0;  // of the lane's experts, a bit each
#pragma unroll 1
    for (int r = 0; r < USED; r++) {
        uint32 top = 0, first = 0;
#pragma unroll
        for (int i = 0; i < EACH; i++)
            if (i * WARP + lane_id() < EXPERTS && !(taken >> i & 1)) top = max(top, p[i] + 1);
        top = warp_max(top);
#pragma unroll
        for (int i = EACH - 1; i >= 0; i--)
            if (i * WARP + lane_id() < EXPERTS && !(taken >> i & 1) && p[i] + 1 == top) first = ~(i * WARP + lane_id());
        int e = int(~warp_max(first));
        if (e % WARP != lane_id()) continue;
        taken |= 1u << e / WARP;
        found(r, e, isobit::from_bits(top - 1));
    }
}
// The weight of the expert of that rank, once chosen; p: of all ranks.
DEV float top_k_weight(int rank, int normalise, const float* p) {
    float all = 0.0f;
    for (int r = 0; r < USED; r++) all = add(all, p[r]);
    return normalise ? div(p[rank], all) : p[rank];
}
#endif
