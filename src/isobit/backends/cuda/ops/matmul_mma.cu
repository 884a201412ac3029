// y = W x for many tokens: int8 tensor-core products of tiled Q4_K and Q6_K weights with both
// planes (docs/numerics.md, section 4). The integers are exact, so any tiling gives matmul.cu's bits.
//
// Experts and pairs are sorted_pairs.cuh's. A block computes ROWS rows for up to TOKENS pairs, and each of
// its 8 warps a part of both. Activations and weights come through shared memory, one superblock
// at a time while the next STAGES - 1 are on their way. In the product's terms a token is a row of A, a weight row
// a column of B: a line of a tile (tiles.cuh) holds one B fragment register for each lane of a warp.
#ifndef AT_ONCE
#define AT_ONCE 2
#endif
#include "mirrors.cuh"
#include "formats.cuh"
#include "sorted_pairs.cuh"
#include "mma.cuh"
#include "tiles.cuh"

// A warp's part: TOKEN_TILES of 16 tokens by ROW_TILES of 8 rows; TOKEN_WARPS lie side by side along the
// tokens. Two blocks of this size fit a multiprocessor. NARROW: half as many rows a block, where there
// are too few blocks.
#ifdef NARROW
constexpr int TOKEN_TILES = 1, ROW_TILES = 2, TOKEN_WARPS = 2;
#else
constexpr int TOKEN_TILES = 2, ROW_TILES = 2, TOKEN_WARPS = 1;
#endif
constexpr int ROW_WARPS = THREADS / WARP / TOKEN_WARPS;
constexpr int TOKENS = TOKEN_WARPS * TOKEN_TILES * 16, ROWS = ROW_WARPS * ROW_TILES * 8;
static_assert(TOKENS == 32 && (ROWS == 128 || ROWS == 64), "a block's size is also known to matmul.py");

#ifdef MMA_Q4_K
using Tile = TiledQ4_K;

// Columns 2t and 2t+1 of the fragment (t = lane % 4): scales, mins and floats of two weight rows.
struct ColumnsQ4_K {
    int scales[2][2];  // [column][word of four groups]
    float d[2], dmin[2];

    DEV void load(const int* tile) {
        for (int c = 0; c < 2; c++) {
            int4 head = reinterpret_cast<const int4*>(tile)[lane_id() % 4 * 2 + c];
            int dd = head.x, s0 = head.y, s2 = head.w;
            scales[c][0] = s0 & 0x3f3f3f3f;
            scales[c][1] = (s2 & 0x0f0f0f0f) | (s0 >> 2 & 0x30303030);
            d[c] = half_to_float(uint16(dd));
            dmin[c] = half_to_float(uint16(dd >> 16));
        }
    }
};

// The mins of the lane's weight row (column lane / 4) as a B fragment over 16 values: groups
// 4t … 4t+3 for t = lane % 4 < 2, zeros above.
DEV int mins_fragment(const int* tile) {
    int4 head = reinterpret_cast<const int4*>(tile)[lane_id() / 4];
    int t = lane_id() % 4, s1 = head.z, s2 = head.w;
    int low = s1 & 0x3f3f3f3f, high = (s2 >> 4 & 0x0f0f0f0f) | (s1 >> 2 & 0x30303030);
    return t == 0 ? low : t == 1 ? high : 0;
}

// Adds one superblock's part to the sums of M tiles of tokens.
template <int M>
DEV void superblock(const ColumnActivations* x, const int* const (&tile)[ROW_TILES],
                    float (&acc)[TOKEN_TILES][ROW_TILES][4]) {
    int lane = lane_id(), g = lane / 4, t = lane % 4;
    ColumnsQ4_K col[ROW_TILES];
#pragma unroll
    for (int n = 0; n < ROW_TILES; n++) col[n].load(tile[n]);
    int sum[M][ROW_TILES][2][4] = {};
    SharedAddress address = shared_address(&x[lane % 16]) + lane / 16 * 16;
#pragma unroll
    for (int group = 0; group < 8; group++) {
        int b[ROW_TILES][2], scale[ROW_TILES][2];
#pragma unroll
        for (int n = 0; n < ROW_TILES; n++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                b[n][i] = tile[n][32 * (1 + group / 2 * 2 + i) + lane] >> group % 2 * 4 & 0x0f0f0f0f;
                scale[n][i] = __byte_perm(col[n].scales[i][group / 4], 0, 0x4440 | group % 4);
            }
#pragma unroll
        for (int m = 0; m < M; m++) {
#pragma unroll
            for (int p = 0; p < PLANES; p++) {
                int a[4];
                load_matrices(a, address + m * 16 * sizeof(ColumnActivations) + p * SUPER + group * 32);
#pragma unroll
                for (int n = 0; n < ROW_TILES; n++) {
                    int dot[4] = {}, s0 = scale[n][0], s1 = scale[n][1];
                    product32(dot, a, b[n][0], b[n][1]);
                    sum[m][n][p][0] += s0 * dot[0];
                    sum[m][n][p][1] += s1 * dot[1];
                    sum[m][n][p][2] += s0 * dot[2];
                    sum[m][n][p][3] += s1 * dot[3];
                }
            }
        }
    }
    int mins[ROW_TILES];
#pragma unroll
    for (int n = 0; n < ROW_TILES; n++) mins[n] = mins_fragment(tile[n]);
#pragma unroll
    for (int m = 0; m < M; m++) {
        const ColumnActivations& x0 = x[16 * m + g];
        const ColumnActivations& x1 = x[16 * m + g + 8];
        int a0[3], a1[3];
#pragma unroll
        for (int i = 0; i < 3; i++) {
            a0[i] = reinterpret_cast<const int*>(x0.digits[i])[t % 2];
            a1[i] = reinterpret_cast<const int*>(x1.digits[i])[t % 2];
        }
#pragma unroll
        for (int n = 0; n < ROW_TILES; n++) {
            int low[4] = {}, middle[4] = {}, high[4] = {};
            product16(low, a0[0], a1[0], mins[n]);
            product16(middle, a0[1], a1[1], mins[n]);
            product16(high, a0[2], a1[2], mins[n]);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                int total = low[i] + (middle[i] << 8) + (high[i] << 16), c = i % 2;
                float u = sub(mul(col[n].d[c], combine_planes(sum[m][n][0][i], sum[m][n][1][i])),
                              mul(col[n].dmin[c], float(total)));
                acc[m][n][i] = add(acc[m][n][i], mul(i < 2 ? x0.d : x1.d, u));
            }
        }
    }
}
#endif

#ifdef MMA_Q6_K
using Tile = TiledQ6_K;

// Sixteen codes at group g (values 16g …) of the lane's row, less 32, times 4.
template <int G>
DEV int codes(const int* tile) {
    constexpr int half = G / 8, in_half = G % 8;
    int low = tile[32 * (4 * half + in_half % 4) + lane_id()];
    int top = tile[32 * (8 + 2 * half + in_half % 2) + lane_id()];
    return signed_codes_q6(low, top, in_half / 4, in_half / 2 % 2);
}

template <int G, int M>
DEV void group_pair(SharedAddress address, const int* const (&tile)[ROW_TILES],
                    int (&sum)[M][ROW_TILES][2][4]) {
    int b[ROW_TILES][2], scale[ROW_TILES][2][2];
#pragma unroll
    for (int n = 0; n < ROW_TILES; n++) {
        b[n][0] = codes<G>(tile[n]);
        b[n][1] = codes<G + 1>(tile[n]);
#pragma unroll
        for (int c = 0; c < 2; c++)
#pragma unroll
            for (int i = 0; i < 2; i++)  // of weight row 2t + c
                scale[n][c][i] = reinterpret_cast<const int8*>(
                    tile[n] + 32 * 12)[16 * (lane_id() % 4 * 2 + c) + G + i];
    }
#pragma unroll
    for (int m = 0; m < M; m++) {
#pragma unroll
        for (int p = 0; p < PLANES; p++) {
            int a[4];
            load_matrices(a, address + m * 16 * sizeof(ColumnActivations) + p * SUPER + G * 16);
#pragma unroll
            for (int n = 0; n < ROW_TILES; n++)
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    int dot[4] = {};
                    product16(dot, a[2 * j], a[2 * j + 1], b[n][j]);
#pragma unroll
                    for (int i = 0; i < 4; i++) sum[m][n][p][i] += scale[n][i % 2][j] * dot[i];
                }
        }
    }
}

// Adds one superblock's part to the sums of M tiles of tokens.
template <int M>
DEV void superblock(const ColumnActivations* x, const int* const (&tile)[ROW_TILES],
                    float (&acc)[TOKEN_TILES][ROW_TILES][4]) {
    int lane = lane_id(), g = lane / 4, t = lane % 4;
    int sum[M][ROW_TILES][2][4] = {};
    SharedAddress address = shared_address(&x[lane % 16]) + lane / 16 * 16;
    group_pair<0>(address, tile, sum);
    group_pair<2>(address, tile, sum);
    group_pair<4>(address, tile, sum);
    group_pair<6>(address, tile, sum);
    group_pair<8>(address, tile, sum);
    group_pair<10>(address, tile, sum);
    group_pair<12>(address, tile, sum);
    group_pair<14>(address, tile, sum);
#pragma unroll
    for (int m = 0; m < M; m++) {
        float dx[2] = {x[16 * m + g].d, x[16 * m + g + 8].d};
#pragma unroll
        for (int n = 0; n < ROW_TILES; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float d4 = scale_q6(tile[n][32 * 13 + t] >> i % 2 * 16);
                float u = mul(d4, combine_planes(sum[m][n][0][i], sum[m][n][1][i]));
                acc[m][n][i] = add(acc[m][n][i], mul(dx[i / 2], u));
            }
    }
}
#endif

// As many tiles of tokens as there are, known to the compiler: products of several run side by side.
template <int M>
DEV void superblock_of(int token_tiles, const ColumnActivations* x, const int* const (&tile)[ROW_TILES],
                       float (&acc)[TOKEN_TILES][ROW_TILES][4]) {
    if (token_tiles >= M) superblock<M>(x, tile, acc);
    else if constexpr (M > 1) superblock_of<M - 1>(token_tiles, x, tile, acc);
}

struct Stage {
    ColumnActivations x[TOKENS];
    __align__(16) uint8 w[ROWS / TILE_ROWS][Tile::TILE_BYTES];
};
struct Shared {
    Stage stage[STAGES];
};

// With more matrices than experts, those of each further round write y_step floats further on.
KERNEL(THREADS) matmul_mma(const uint8* weights, int64 matrix_bytes, const ActivationBlock* x, int supers,
                           const int* sorted_pairs, const int* expert_offsets, int top_k, int pairs, float* y,
                           int rows, int row_stride, int experts, int64 y_step, const uint64* exchanges) {
    begin();
    DYNAMIC_SHARED(Shared, shared);
    SortedPairs at(sorted_pairs, expert_offsets, top_k, pairs, blockIdx.y % experts);
    y += blockIdx.y / experts * y_step;
    int first_row = blockIdx.x * ROWS, tiles = min(ROWS, rows - first_row) / TILE_ROWS;
    int warp_tile = warp_id() % ROW_WARPS * ROW_TILES;              // of the block's
    int warp_item = warp_id() / ROW_WARPS * TOKEN_TILES * 16;       // of the block's
    const uint8* matrix =
        weights + blockIdx.y * matrix_bytes + int64(first_row / TILE_ROWS) * supers * Tile::TILE_BYTES;
    constexpr int WARPS = THREADS / WARP, W_CHUNKS = Tile::TILE_BYTES / 16;

    for (int base = at.begin + blockIdx.z * TOKENS; base < at.end; base += gridDim.z * TOKENS) {
        int n = min(TOKENS, at.end - base), padded = (n + 15) / 16 * 16;
        __syncthreads();  // everyone is done with the previous pairs
        // A warp brings every eighth pair and tile. Pairs past the end repeat the last; they are
        // not stored.
        const ActivationBlock* from[TOKENS / WARPS];
#pragma unroll
        for (int i = 0; i < TOKENS / WARPS; i++)
            from[i] = x + int64(at.input(base + min(warp_id() + WARPS * i, n - 1))) * supers;
        auto fetch = [&](int s) {
            if (s >= supers) {
                commit_copies();  // an empty group keeps the count
                return;
            }
            Stage& to = shared->stage[s % STAGES];
#pragma unroll
            for (int i = 0; i < ROWS / TILE_ROWS / WARPS; i++) {
                int tile = warp_id() + WARPS * i;
                if (tile >= tiles) break;
                const uint8* w = matrix + (int64(tile) * supers + s) * Tile::TILE_BYTES;
#pragma unroll
                for (int chunk = lane_id(); chunk < W_CHUNKS; chunk += WARP)
                    copy_async(to.w[tile] + 16 * chunk, w + 16 * chunk);
            }
#pragma unroll
            for (int i = 0; i < TOKENS / WARPS; i++) {
                int pair = warp_id() + WARPS * i;
                if (pair >= padded) break;
                copy_activations(&to.x[pair], from[i] + s);
            }
            commit_copies();
        };
        int token_tiles = (n - warp_item + 15) / 16;
        float acc[TOKEN_TILES][ROW_TILES][4] = {};
        for (int s = 0; s < STAGES - 1; s++) fetch(s);
        for (int s = 0; s < supers; s++) {
            wait_copies<STAGES - 2>();
            __syncthreads();  // superblock s is there, and everyone is done with the one before
            fetch(s + STAGES - 1);
            const Stage& stage = shared->stage[s % STAGES];
            const int* tile[ROW_TILES];
#pragma unroll
            for (int r = 0; r < ROW_TILES; r++)
                tile[r] = reinterpret_cast<const int*>(stage.w[warp_tile + r]);
            if (token_tiles > 0 && warp_tile < tiles)
                superblock_of<TOKEN_TILES>(token_tiles, stage.x + warp_item, tile, acc);
        }
        Mirrors mirrors(exchanges);
#pragma unroll
        for (int m = 0; m < TOKEN_TILES; m++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                int pair = warp_item + 16 * m + 8 * half + lane_id() / 4;
                if (pair >= n) continue;
                float* out = y + int64(at.output(base + pair)) * row_stride +
                             first_row + lane_id() % 4 * 2;
#pragma unroll
                for (int r = 0; r < ROW_TILES; r++)
                    if (warp_tile + r < tiles) {
#ifdef MIRRORED  // other devices are sent as few pieces as may be
                        mirrors.store(reinterpret_cast<float2*>(out + 8 * (warp_tile + r)),
                                      make_float2(acc[m][r][2 * half], acc[m][r][2 * half + 1]));
#else
                        out[8 * (warp_tile + r)] = acc[m][r][2 * half];
                        out[8 * (warp_tile + r) + 1] = acc[m][r][2 * half + 1];
#endif
                    }
            }
    }
}
