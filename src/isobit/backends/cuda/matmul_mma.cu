// y = W x for many tokens: int8 tensor-core products of tiled Q4_K and Q6_K weights with both
// planes (docs/numerics.md, section 4). The integers are exact, so any tiling gives matmul.cu's bits.
//
// Segments and items are matmul.cu's. A block computes ROWS rows for up to TOKENS items: 8 warps of 16
// rows each, which all read the items' activations from shared memory, one superblock at a time
// while the next is on its way. In the product's terms a token is a row of A, a weight row a column
// of B: a line of a tile (tiles.cuh) holds one B fragment register for each lane of a warp.
#include "items.cuh"
#include "mma.cuh"
#include "tiles.cuh"

constexpr int TOKENS = 64, ROWS = 128, TOKEN_TILES = TOKENS / 16, ROW_TILES = 2;

struct Stage {
    Act x[TOKENS];
};
struct Shared {
    Stage stage[2];
    int input[TOKENS];
};

// A lane's part of one superblock of 8 rows: word lane of each line.
struct WordsQ4_K {
    using Tile = TiledQ4_K;
    int w[9];
    DEV void load(const uint8* tile) {
        const int* p = reinterpret_cast<const int*>(tile) + lane_id();
#pragma unroll
        for (int i = 0; i < 9; i++) w[i] = load_once(p + 32 * i);
    }
};

// Columns 2t and 2t+1 of the fragment (t = lane % 4): scales, mins and floats of two weight rows.
struct ColumnsQ4_K {
    int scales[2][2];  // [column][word of four groups]
    float d[2], dmin[2];

    DEV void load(const WordsQ4_K& words) {
        for (int c = 0; c < 2; c++) {
            int from = 4 * (lane_id() % 4 * 2 + c);
            int dd = shuffle(words.w[0], from), s0 = shuffle(words.w[0], from + 1);
            int s1 = shuffle(words.w[0], from + 2), s2 = shuffle(words.w[0], from + 3);
            scales[c][0] = s0 & 0x3f3f3f3f;
            scales[c][1] = (s2 & 0x0f0f0f0f) | (s0 >> 2 & 0x30303030);
            d[c] = half_to_float(uint16(dd));
            dmin[c] = half_to_float(uint16(dd >> 16));
        }
    }
};

#ifdef MMA_Q4_K
using Words = WordsQ4_K;

// The mins of the lane's weight row (column lane / 4) as a B fragment over 16 values: groups
// 4t … 4t+3 for t = lane % 4 < 2, zeros above.
DEV int mins_fragment(const WordsQ4_K& words) {
    int base = lane_id() & ~3;
    int s0 = shuffle(words.w[0], base + 1), s1 = shuffle(words.w[0], base + 2);
    int s2 = shuffle(words.w[0], base + 3);
    int t = lane_id() % 4;
    int low = s1 & 0x3f3f3f3f, high = (s2 >> 4 & 0x0f0f0f0f) | (s1 >> 2 & 0x30303030);
    return t == 0 ? low : t == 1 ? high : 0;
}

DEV void superblock(const Stage& stage, const Words (&words)[ROW_TILES], int token_tiles,
                    float (&acc)[TOKEN_TILES][ROW_TILES][4]) {
    int lane = lane_id(), g = lane / 4, t = lane % 4;
    ColumnsQ4_K col[ROW_TILES];
#pragma unroll
    for (int n = 0; n < ROW_TILES; n++) col[n].load(words[n]);
    int sum[TOKEN_TILES][ROW_TILES][2][4] = {};
    SharedAddress address = shared_address(&stage.x[lane % 16]) + lane / 16 * 16;
#pragma unroll
    for (int group = 0; group < 8; group++) {
#pragma unroll
        for (int m = 0; m < TOKEN_TILES; m++) {
            if (m >= token_tiles) break;
#pragma unroll
            for (int p = 0; p < PLANES; p++) {
                int a[4];
                load_matrices(a, address + m * 16 * sizeof(Act) + p * SUPER + group * 32);
#pragma unroll
                for (int n = 0; n < ROW_TILES; n++) {
                    int shift = group % 2 * 4, line = 1 + group / 2 * 2, dot[4] = {};
                    product32(dot, a, words[n].w[line] >> shift & 0x0f0f0f0f,
                              words[n].w[line + 1] >> shift & 0x0f0f0f0f);
                    int s0 = byte_of(col[n].scales[0][group / 4], group % 4);
                    int s1 = byte_of(col[n].scales[1][group / 4], group % 4);
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
    for (int n = 0; n < ROW_TILES; n++) mins[n] = mins_fragment(words[n]);
#pragma unroll
    for (int m = 0; m < TOKEN_TILES; m++) {
        if (m >= token_tiles) break;
        const Act& x0 = stage.x[16 * m + g];
        const Act& x1 = stage.x[16 * m + g + 8];
        // The group sums fit 24 bits: M as three products of bytes, the two lower ones unsigned.
        int4 v0 = *reinterpret_cast<const int4*>(x0.sum32 + t % 2 * 4);
        int4 v1 = *reinterpret_cast<const int4*>(x1.sum32 + t % 2 * 4);
#pragma unroll
        for (int n = 0; n < ROW_TILES; n++) {
            int low[4] = {}, middle[4] = {}, high[4] = {};
            product16_unsigned(low, gather_bytes<0>(v0.x, v0.y, v0.z, v0.w),
                               gather_bytes<0>(v1.x, v1.y, v1.z, v1.w), mins[n]);
            product16_unsigned(middle, gather_bytes<1>(v0.x, v0.y, v0.z, v0.w),
                               gather_bytes<1>(v1.x, v1.y, v1.z, v1.w), mins[n]);
            product16(high, gather_bytes<2>(v0.x, v0.y, v0.z, v0.w),
                      gather_bytes<2>(v1.x, v1.y, v1.z, v1.w), mins[n]);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                int total = low[i] + (middle[i] << 8) + (high[i] << 16), c = i % 2;
                float u = sub(mul(col[n].d[c], join_planes(sum[m][n][0][i], sum[m][n][1][i])),
                              mul(col[n].dmin[c], float(total)));
                acc[m][n][i] = add(acc[m][n][i], mul(i < 2 ? x0.d : x1.d, u));
            }
        }
    }
}
#endif

#ifdef MMA_Q6_K
struct WordsQ6_K {
    using Tile = TiledQ6_K;
    int w[13];
    int d;  // of columns 2t and 2t+1, two halves
    DEV void load(const uint8* tile) {
        const int* p = reinterpret_cast<const int*>(tile) + lane_id();
#pragma unroll
        for (int i = 0; i < 13; i++) w[i] = load_once(p + 32 * i);
        d = reinterpret_cast<const int*>(tile + 128 * 13)[lane_id() % 4];
    }
};
using Words = WordsQ6_K;

// Sixteen codes at group g (values 16g …) of the lane's row, less 32.
template <int G>
DEV int codes(const Words& words) {
    constexpr int half = G / 8, in_half = G % 8, chunk = 4 * half + in_half % 4;
    constexpr int quarter = in_half / 2;  // which two bits of the top byte
    int low = words.w[chunk] >> (in_half / 4 * 4) & 0x0f0f0f0f;
    int top = words.w[8 + 2 * half + in_half % 2] >> (2 * quarter) & 0x03030303;
    return ((low | top << 4) + 0x60606060) ^ int(0x80808080);
}

template <int G>
DEV void group_pair(SharedAddress address, const Words (&words)[ROW_TILES],
                    const int (&scales)[ROW_TILES][2][4], int token_tiles,
                    int (&sum)[TOKEN_TILES][ROW_TILES][2][4]) {
#pragma unroll
    for (int m = 0; m < TOKEN_TILES; m++) {
        if (m >= token_tiles) break;
#pragma unroll
        for (int p = 0; p < PLANES; p++) {
            int a[4];
            load_matrices(a, address + m * 16 * sizeof(Act) + p * SUPER + G * 16);
#pragma unroll
            for (int n = 0; n < ROW_TILES; n++) {
                int first[4] = {}, second[4] = {};
                product16(first, a[0], a[1], codes<G>(words[n]));
                product16(second, a[2], a[3], codes<G + 1>(words[n]));
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    int s = scales[n][i % 2][G / 4];
                    sum[m][n][p][i] += signed_byte_of(s, G % 4) * first[i];
                    sum[m][n][p][i] += signed_byte_of(s, G % 4 + 1) * second[i];
                }
            }
        }
    }
}

DEV void superblock(const Stage& stage, const Words (&words)[ROW_TILES], int token_tiles,
                    float (&acc)[TOKEN_TILES][ROW_TILES][4]) {
    int lane = lane_id(), g = lane / 4, t = lane % 4;
    int scales[ROW_TILES][2][4];
#pragma unroll
    for (int n = 0; n < ROW_TILES; n++)
#pragma unroll
        for (int c = 0; c < 2; c++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                scales[n][c][i] = shuffle(words[n].w[12], 4 * (2 * t + c) + i);
    int sum[TOKEN_TILES][ROW_TILES][2][4] = {};
    SharedAddress address = shared_address(&stage.x[lane % 16]) + lane / 16 * 16;
    group_pair<0>(address, words, scales, token_tiles, sum);
    group_pair<2>(address, words, scales, token_tiles, sum);
    group_pair<4>(address, words, scales, token_tiles, sum);
    group_pair<6>(address, words, scales, token_tiles, sum);
    group_pair<8>(address, words, scales, token_tiles, sum);
    group_pair<10>(address, words, scales, token_tiles, sum);
    group_pair<12>(address, words, scales, token_tiles, sum);
    group_pair<14>(address, words, scales, token_tiles, sum);
#pragma unroll
    for (int m = 0; m < TOKEN_TILES; m++) {
        if (m >= token_tiles) break;
        float dx[2] = {stage.x[16 * m + g].d, stage.x[16 * m + g + 8].d};
#pragma unroll
        for (int n = 0; n < ROW_TILES; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float d = half_to_float(uint16(words[n].d >> i % 2 * 16));
                float u = mul(d, join_planes(sum[m][n][0][i], sum[m][n][1][i]));
                acc[m][n][i] = add(acc[m][n][i], mul(dx[i / 2], u));
            }
    }
}
#endif

KERNEL(THREADS) matmul_mma(const uint8* weights, int64 matrix_bytes, const Act* x, int supers,
                           const int* order, const int* offset, int divide, int items,
                           float* y, int rows, int row_stride) {
    DYNAMIC_SHARED(Shared, shared);
    Items at(order, offset, divide, items);
    int first_row = blockIdx.x * ROWS + warp_id() * 8 * ROW_TILES;
    int64 tile_row_bytes = int64(supers) * Words::Tile::TILE_BYTES;
    const uint8* tiles = weights + blockIdx.y * matrix_bytes + first_row / 8 * tile_row_bytes;
    constexpr int CHUNKS = sizeof(Act) / 16;

    for (int base = at.begin + blockIdx.z * TOKENS; base < at.end; base += gridDim.z * TOKENS) {
        int n = min(TOKENS, at.end - base), token_tiles = (n + 15) / 16;
        __syncthreads();  // everyone is done with the previous items
        if (int(threadIdx.x) < TOKENS)  // items past the end repeat the last; they are not stored
            shared->input[threadIdx.x] = at.input(base + min(int(threadIdx.x), n - 1));
        __syncthreads();
        auto fetch = [&](int s) {
            for (int i = threadIdx.x; i < token_tiles * 16 * CHUNKS; i += THREADS) {
                int item = i / CHUNKS, chunk = i % CHUNKS;
                const Act* from = x + int64(shared->input[item]) * supers + s;
                copy_async(reinterpret_cast<int4*>(&shared->stage[s % 2].x[item]) + chunk,
                           reinterpret_cast<const int4*>(from) + chunk);
            }
            commit_copies();
        };
        bool held[ROW_TILES];
        Words words[2][ROW_TILES];
        for (int r = 0; r < ROW_TILES; r++) held[r] = first_row + 8 * r < rows;
        auto fetch_words = [&](int s, Words (&to)[ROW_TILES]) {
#pragma unroll
            for (int r = 0; r < ROW_TILES; r++)
                if (held[r])
                    to[r].load(tiles + r * tile_row_bytes + int64(s) * Words::Tile::TILE_BYTES);
        };
        float acc[TOKEN_TILES][ROW_TILES][4] = {};
        fetch(0);
        fetch_words(0, words[0]);
        for (int s = 0; s < supers; s++) {
            if (s + 1 < supers) {
                fetch(s + 1);
                fetch_words(s + 1, words[1]);
                wait_copies<1>();
            } else {
                wait_copies<0>();
            }
            __syncthreads();
            superblock(shared->stage[s % 2], words[0], token_tiles, acc);
            __syncthreads();
#pragma unroll
            for (int r = 0; r < ROW_TILES; r++) words[0][r] = words[1][r];
        }
#pragma unroll
        for (int m = 0; m < TOKEN_TILES; m++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                int item = 16 * m + 8 * half + lane_id() / 4;
                if (item >= n) continue;
                float* out = y + int64(at.output(base + item)) * row_stride;
#pragma unroll
                for (int r = 0; r < ROW_TILES; r++) {
                    int row = first_row + 8 * r + lane_id() % 4 * 2;
                    if (row < rows) out[row] = acc[m][r][2 * half];
                    if (row + 1 < rows) out[row + 1] = acc[m][r][2 * half + 1];
                }
            }
    }
}
