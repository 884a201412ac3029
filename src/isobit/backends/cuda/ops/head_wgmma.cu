// y = W x on Hopper, for an output matrix of Q6_K and some tokens: by products of warpgroups. A code less 32 times its
// sub-scale is two digits of 256, which both are operands, so that no group of 16 values needs a multiplication
// of its own. So that no value is below 0, BIAS is added to it, and BIAS times the sum of the activations taken away.
//
// A warpgroup takes 64 rows at a time, a warp 16 of them, whose weights it fetches for itself, DEPTH superblocks
// ahead. Its operands serve PARTS times COLUMNS tokens, of all of which HELD superblocks are in shared memory at
// once; with more than those the rows' sums so far wait in y.
#define SHARED_ALIGNMENT 1024  // bits of addresses choose the order of chunks (wgmma.cuh)
#include "tiles.cuh"
#include "wgmma.cuh"

constexpr int TOKENS = PARTS * COLUMNS, TILES = COLUMNS / 8, STEPS = SUPER / 32;
constexpr int HEAD_WARPS = BLOCK / WARP, GROUPS = BLOCK / 128, SLOT = 2 * TiledQ6_K::TILE_BYTES;
constexpr uint32 BIAS = 0x8080;
constexpr int ONES = 0x01010101;

// A superblock of tokens: half of the values; a row is a token.
struct __align__(1024) TokenPlane {
    uint8 at[2][TOKENS * 128];

    // Chunk i of 16 of a token.
    DEV uint8* chunk(int token, int i) { return at[i / 8] + swizzled(token, i % 8); }
};

struct Shared {
    TokenPlane x[HELD][PLANES];
    float d[HELD][TOKENS];
    int less[HELD][PLANES][TOKENS];  // what the bias adds
    __align__(16) uint8 slot[HEAD_WARPS][DEPTH][SLOT];
    Arrival arrival[HEAD_WARPS][DEPTH];
};

// Sixteen rows of a superblock as operands: [digit][32 values][register], the higher digit first; d of rows g and g + 8.
struct Digits {
    uint32 a[2][STEPS][4];
    float d[2];

    DEV void unpack(const uint8* slot) {
        constexpr int BYTES = TiledQ6_K::TILE_BYTES;
        const int* tile[2] = {reinterpret_cast<const int*>(slot), reinterpret_cast<const int*>(slot + BYTES)};
        int lane = lane_id();
        int scales[2][4];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            int4 of = reinterpret_cast<const int4*>(tile[r] + 32 * 12)[lane / 4];
            scales[r][0] = of.x, scales[r][1] = of.y, scales[r][2] = of.z, scales[r][3] = of.w;
            d[r] = half_to_float(reinterpret_cast<const uint16*>(tile[r] + 32 * 13)[lane / 4]);
        }
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                uint32 top = tile[i % 2][32 * (8 + 2 * half + i / 2) + lane];
#pragma unroll
                for (int odd = 0; odd < 2; odd++) {
                    uint32 low = tile[i % 2][32 * (4 * half + 2 * odd + i / 2) + lane];
#pragma unroll
                    for (int upper = 0; upper < 2; upper++) {
                        int group = 8 * half + 4 * upper + 2 * odd, left = 4 - 4 * upper - 2 * odd;
                        uint32 scale = signed_byte_of(scales[i % 2][group / 4], group % 4 + i / 2);
                        uint32 high = (left > 0 ? top << left : top >> -left) & 0x30303030;
                        uint32 code = (low >> 4 * upper & 0x0f0f0f0f) | high;
                        uint32 more = BIAS * 0x10001 - scale * 0x200020u;
                        uint32 even = __byte_perm(code, 0, 0x4240) * scale + more;  // two values each
                        uint32 other = __byte_perm(code, 0, 0x4341) * scale + more;
                        a[0][group / 2][i] = __byte_perm(even, other, 0x7351);
                        a[1][group / 2][i] = __byte_perm(even, other, 0x6240);
                    }
                }
            }
    }
};

// A warp's weights on their way: of each of its row tiles the superblocks that are held, then the next ones'.
struct Stream {
    Shared* sh;
    const uint8* weights;
    int row_tiles, supers, first, step;
    int begin = 0, tile, s = 0, to = 0, use = 0, phase = 0;  // fetched next; slots that are filled and emptied next

    DEV Stream(Shared* sh, const uint8* weights, int row_tiles, int supers, int first, int step)
        : sh(sh), weights(weights), row_tiles(row_tiles), supers(supers), first(first), step(step), tile(first) {
        if (lane_id() < DEPTH) arrival_init(&sh->arrival[warp_id()][lane_id()]);
        __syncwarp();
#pragma unroll 1
        for (int i = 0; i < DEPTH; i++) fetch();
    }
    DEV const uint8* wait() const {
        arrival_wait(&sh->arrival[warp_id()][use], phase);
        return sh->slot[warp_id()][use];
    }
    DEV void done() {
        if (++use == DEPTH) use = 0, phase ^= 1;
        __syncwarp();
        fetch();
    }

   private:
    DEV void fetch() {
        if (begin >= supers || tile >= row_tiles) return;
        if (lane_id() == 0) {
            constexpr int BYTES = TiledQ6_K::TILE_BYTES;
            const uint8* from = weights + (int64(2 * (4 * tile + warp_id() % 4)) * supers + begin + s) * BYTES;
            uint8* bytes = sh->slot[warp_id()][to];
            Arrival* a = &sh->arrival[warp_id()][to];
            arrival_expect(a, SLOT);
            copy_bulk_once(bytes, from, BYTES, a);
            copy_bulk_once(bytes + BYTES, from + supers * BYTES, BYTES, a);
        }
        to = to + 1 < DEPTH ? to + 1 : 0;
        if (++s < min(HELD, supers - begin)) return;
        s = 0, tile += step;
        if (tile >= row_tiles) tile = first, begin += HELD;
    }
};

// Activations of superblocks begin … of `count` tokens; missing ones repeat the last.
DEV void fetch_activations(Shared* sh, const ActivationBlock* x, int supers, int begin, int count) {
    int held = min(HELD, supers - begin);
#pragma unroll 4
    for (int i = threadIdx.x; i < held * TOKENS * PLANES * 16; i += BLOCK) {
        int chunk = i % 16, p = i / 16 % PLANES, token = i / 16 / PLANES % TOKENS, s = i / 16 / PLANES / TOKENS;
        const ActivationBlock* from = x + int64(min(token, count - 1)) * supers + begin + s;
        copy_async(sh->x[s][p].chunk(token, chunk), from->plane[p] + 16 * chunk);
    }
    commit_copies();
    for (int i = threadIdx.x; i < held * TOKENS; i += BLOCK) {
        int token = i % TOKENS, s = i / TOKENS;
        sh->d[s][token] = x[int64(min(token, count - 1)) * supers + begin + s].d;
    }
    wait_copies<0>();
    written_for_products();
    __syncthreads();
    for (int i = threadIdx.x; i < held * PLANES * TOKENS; i += BLOCK) {
        int token = i % TOKENS, p = i / TOKENS % PLANES, s = i / TOKENS / PLANES, sum = 0;
#pragma unroll
        for (int chunk = 0; chunk < 16; chunk++) {
            int4 v = *reinterpret_cast<const int4*>(sh->x[s][p].chunk(token, chunk));
            sum = dp4a(v.x, ONES, dp4a(v.y, ONES, dp4a(v.z, ONES, dp4a(v.w, ONES, sum))));
        }
        sh->less[s][p][token] = sum * -int(BIAS);
    }
    __syncthreads();
}

// A plane of the columns times a digit of the rows, with MORE added to what is there.
template <bool MORE>
DEV void products(const uint32 (&a)[STEPS][4], const TokenPlane& x, int first, int (&sum)[COLUMNS / 2]) {
    products_begin();
#pragma unroll
    for (int step = 0; step < STEPS; step++)
        product_rows(sum, a[step], matrix_at(x.at[step / 4] + first * 128) + step % 4 * 2, MORE || step > 0);
    products_commit();
}

// f(sum, its place) for what a lane has of a warp's 16 rows; y: of its first row.
template <class F>
DEV void each_value(float (&sum)[PARTS][TILES][4], float* y, int count, int stride, F f) {
#pragma unroll
    for (int part = 0; part < PARTS; part++)
#pragma unroll
        for (int n = 0; n < TILES; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                int column = part * COLUMNS + 8 * n + 2 * (lane_id() % 4) + i % 2;
                if (column < count) f(sum[part][n][i], y + int64(column) * stride + i / 2 * 8);
            }
}

// tokens: at most as many as there are columns.
KERNEL(BLOCK) head_wgmma(const uint8* weights, int row_tiles, int supers, const ActivationBlock* x, int tokens, float* y,
                         int stride) {
    DYNAMIC_SHARED(Shared, sh);
    let_next_start();
    int first = blockIdx.x * GROUPS + shuffle(int(threadIdx.x) / 128, 0), step = gridDim.x * GROUPS;
    int g = lane_id() / 4, t = lane_id() % 4;
    Stream stream(sh, weights, row_tiles, supers, first, step);
    y += 16 * (warp_id() % 4) + g;
    wait_for_previous();
#pragma unroll 1
    for (int begin = 0; begin < supers; begin += HELD) {
        int held = min(HELD, supers - begin);
        if (begin) __syncthreads();  // nobody needs the superblocks before
        fetch_activations(sh, x, supers, begin, tokens);
#pragma unroll 1
        for (int tile = first; tile < row_tiles; tile += step) {
            float sum[PARTS][TILES][4] = {}, *to = y + 64 * tile;
            if (begin) each_value(sum, to, tokens, stride, [](float& v, const float* at) { v = *at; });
#pragma unroll 1
            for (int s = 0; s < held; s++) {
                Digits rows;
                rows.unpack(stream.wait());
                stream.done();
#pragma unroll
                for (int part = 0; part < PARTS; part++) {
                    int dot[PLANES][COLUMNS / 2], column = part * COLUMNS;
#pragma unroll
                    for (int p = 0; p < PLANES; p++) products<false>(rows.a[0], sh->x[s][p], column, dot[p]);
#pragma unroll
                    for (int p = 0; p < PLANES; p++) {  // while tensor cores work for the other plane
                        products_wait<PLANES - 1>();
                        computed(dot[p]);
#pragma unroll
                        for (int n = 0; n < TILES; n++) {
                            int2 less = *reinterpret_cast<const int2*>(sh->less[s][p] + column + 8 * n + 2 * t);
#pragma unroll
                            for (int i = 0; i < 4; i++) dot[p][4 * n + i] = dot[p][4 * n + i] * 256 + (i % 2 ? less.y : less.x);
                        }
                        products<true>(rows.a[1], sh->x[s][p], column, dot[p]);
                    }
                    products_wait<0>();
#pragma unroll
                    for (int p = 0; p < PLANES; p++) computed(dot[p]);
#pragma unroll
                    for (int n = 0; n < TILES; n++) {
                        float2 by = *reinterpret_cast<const float2*>(sh->d[s] + column + 8 * n + 2 * t);
#pragma unroll
                        for (int i = 0; i < 4; i++) {
                            float u = mul(rows.d[i / 2], combine_planes(dot[0][4 * n + i], dot[PLANES - 1][4 * n + i]));
                            sum[part][n][i] = add(sum[part][n][i], mul(i % 2 ? by.y : by.x, u));
                        }
                    }
                }
            }
            each_value(sum, to, tokens, stride, [](float v, float* at) { *at = v; });
        }
    }
}
