// Attention of any tokens whose keys and values are in the cache, and whose queries are quantised
// (docs/numerics.md, section 6).
#include "key_tiles.cuh"

// Blocks: x tiles (dealt), y key-value head, z token. q: 16-bit, [token][HEADS][HEAD_DIM]; dq: their scales
// with that of the scores. in_runs: which tokens others attend to, if there is such.
KERNEL(320) cached_attention(const short* q, const float* dq, const int* positions,
                             const int* sequence, const int* pages, int each, int8* k, int8* v,
                             float* dk, float* dv, int most_tiles, float2* max_and_sum, float* out,
                             ActivationBlock* acts, const int* in_runs) {
    DYNAMIC_SHARED(AttentionShared, sh);
    Cache cache = {k, v, dk, dv, KV_HEADS, HEAD_DIM};
    int head = blockIdx.y, token = blockIdx.z;
    Fetches fetches = {sh, cache, head};
    fetches.prepare();
    for (int i = threadIdx.x; i < int(sizeof sh->q) / 4; i += ATTENTION_THREADS)
        reinterpret_cast<int*>(sh->q)[i] = 0;  // heads that are not there stay so
    begin();
    if (in_runs && in_runs[token]) return;
    int position = positions[token], tiles = position / KV_PAGE + 1;
    if (int(blockIdx.x) >= tiles) return;
    pages += sequence[token] * each;
    auto fetch = [&](int n, int which) {
        int at = blockIdx.x + n * gridDim.x;
        if (at < tiles) fetches.fetch(n, pages[at], which);
        else fetches.none();
    };
    for (int n = 0; n < BUFFERS; n++) fetch(n, 0), fetch(n, 1);
    __syncthreads();  // the zeros are there
    int64 first = int64(token) * HEADS + head * GROUP;
    for (int i = threadIdx.x; i < GROUP * HEAD_DIM; i += ATTENTION_THREADS) {
        int value = q[first * HEAD_DIM + i];
        sh->q[0][i / HEAD_DIM][i % HEAD_DIM] = int8(isobit::high_plane(value));
        sh->q[1][i / HEAD_DIM][i % HEAD_DIM] = int8(isobit::low_plane(value));
    }
    if (threadIdx.x < GROUP) sh->dq[threadIdx.x] = dq[first + threadIdx.x];
    __syncthreads();
    attend(fetches, token, position, tiles, fetch, [](int) { return false; }, [](int, TileBytes&) {}, most_tiles, max_and_sum, out,
           acts);
}
