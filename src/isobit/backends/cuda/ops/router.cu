// A router and its choice of experts: dense.cuh, whose rows are experts, and a cluster of blocks has all of them, each block for one of the
// tokens that it chooses for once the others have sent it their logits.
#include "dense.cuh"
#include "router.cuh"

struct RouterShared {
    DenseShared product;
    float z[CLUSTER * HALVES * ROWS];
};
KERNEL(512) router(const uint8* weights, const float* x, int columns, int tokens, int each, float* y, int experts,
                   int stride, int k, int normalise, int softmax, const float* bias, int* ids, float* shares) {
#ifdef BULK_COPIES  // else there are no clusters, and nothing launches it
    DYNAMIC_SHARED(RouterShared, sh);
    int begin = blockIdx.y * each, end = min(begin + each, tokens), mine = begin + blockIdx.x;
    auto wait = [] {
        sync_cluster();  // all have begun
        let_next_start();
        wait_for_previous();
    };
    multiply(&sh->product, weights, x, columns, begin, end, experts, wait,
             [&](int token, int row, float z) { send_to_block(sh->z + row, token - begin, z); });
    sync_cluster();
    if (mine >= end) return;
#pragma unroll 1
    for (int e = threadIdx.x; e < experts; e += 512) y[int64(mine) * stride + e] = sh->z[e];
    Router of = {experts, k, normalise, softmax, bias, 1, 1};
    if (warp_id() == 0) of.router_top_k(sh->z, nullptr, ids + mine * k, shares + mine * k);
#endif
}
