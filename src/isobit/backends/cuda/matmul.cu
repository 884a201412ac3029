// y = W x for every weight format (docs/numerics.md, section 4), one matrix or a stack of experts.
//
// A launch covers segments: segment e multiplies matrix e with the items offset[e] … offset[e+1]-1
// of `order`. Item i reads activation row i / divide and writes output row i. Without `order` there
// is one matrix, and the items are the tokens. blockIdx: x rows, y segment, z chunks of items.
//
// WEIGHT is one of TiledQ4_K, TiledQ6_K (8 rows by a superblock, repacked: tiles.cuh), a block
// format of formats.cuh (the file's bytes), or KIND_F32, KIND_F16, KIND_BF16.
#include "formats.cuh"
#include "tiles.cuh"

struct Items {
    const int* order;
    const int* offset;
    int divide, begin, end;

    DEV Items(const int* order, const int* offset, int divide, int items)
        : order(order), offset(offset), divide(divide),
          begin(offset ? offset[blockIdx.y] : 0), end(offset ? offset[blockIdx.y + 1] : items) {}
    DEV int output(int i) const { return order ? order[i] : i; }
    DEV int input(int i) const { return output(i) / divide; }
};

constexpr int CHUNK = 8;  // items that share one read of a weight

#ifdef TILED
// 32 rows a block: eight warps hold 4 groups of 8 rows by 8 superblocks, a superblock a lane.
constexpr int BLOCK_ROWS = 32, BLOCK_SUPERS = 8;

struct Shared {
    Act x[CHUNK][BLOCK_SUPERS];
    float part[CHUNK][BLOCK_SUPERS][BLOCK_ROWS];
};

KERNEL(THREADS) matmul(const uint8* weights, int64 matrix_bytes, const Act* x, int supers,
                       const int* order, const int* offset, int divide, int items,
                       float* y, int rows, int row_stride) {
    DYNAMIC_SHARED(Shared, shared);
    Items at(order, offset, divide, items);
    const uint8* matrix = weights + blockIdx.y * matrix_bytes;
    int group = warp_id() / 2, row = lane_id() % TILE_ROWS;
    int super = warp_id() % 2 * 4 + lane_id() / TILE_ROWS;
    int first_row = blockIdx.x * BLOCK_ROWS + group * TILE_ROWS;
    const uint8* tiles = matrix + int64(first_row / TILE_ROWS) * supers * WEIGHT::TILE_BYTES;
    int sum_item = warp_id(), sum_row = lane_id();  // for which this thread adds superblocks

    for (int base = at.begin + blockIdx.z * CHUNK; base < at.end; base += gridDim.z * CHUNK) {
        int n = min(CHUNK, at.end - base);
        float sum = 0.0f;
        for (int s0 = 0; s0 < supers; s0 += BLOCK_SUPERS) {
            int ns = min(BLOCK_SUPERS, supers - s0);
            constexpr int WORDS = sizeof(Act) / sizeof(int4);
            __syncthreads();
            for (int i = threadIdx.x; i < n * ns * WORDS; i += THREADS) {
                int item = i / (ns * WORDS), word = i % (ns * WORDS);
                const Act* from = x + int64(at.input(base + item)) * supers + s0;
                reinterpret_cast<int4*>(shared->x[item])[word] =
                    reinterpret_cast<const int4*>(from)[word];
            }
            __syncthreads();
            if (super < ns && first_row < rows) {
                WEIGHT w;
                w.load(tiles + int64(s0 + super) * WEIGHT::TILE_BYTES, row);
                for (int item = 0; item < n; item++) {
                    const Act& a = shared->x[item][super];
                    shared->part[item][super][group * TILE_ROWS + row] = mul(a.d, w.dot(a));
                }
            }
            __syncthreads();
            for (int s = 0; s < ns; s++) sum = add(sum, shared->part[sum_item][s][sum_row]);
        }
        int out_row = blockIdx.x * BLOCK_ROWS + sum_row;
        if (sum_item < n && out_row < rows)
            y[int64(at.output(base + sum_item)) * row_stride + out_row] = sum;
    }
}
#endif

#ifdef BLOCKS
// A row a warp; a lane holds 8 values of each superblock.
DEV void dot8(int2 codes, const Act& a, int k, int (&sum)[2]) {
#pragma unroll
    for (int p = 0; p < PLANES; p++) {
        int2 x = *reinterpret_cast<const int2*>(a.plane[p] + k);
        sum[p] = dp4a(codes.y, x.y, dp4a(codes.x, x.x, 0));
    }
}

DEV int sum16(const Act& a, int g) {
    return (PLANES == 2 ? 256 * a.neg16[0][g] + a.neg16[1][g] : a.neg16[0][g]) / -32;
}

// One superblock of one row with one activation: t_s, the same in every lane.
DEV float superblock(const WEIGHT& w, bool held, const Act& a) {
    int k = 8 * lane_id(), in_block = k % WEIGHT::SIZE, g = in_block / WEIGHT::GROUP;
    int sum[2] = {0, 0}, m = 0;
    float d = 0.0f, dmin = 0.0f;
    if (held) {
        dot8(make_int2(w.codes(in_block), w.codes(in_block + 4)), a, k, sum);
        sum[0] *= w.scale(g);
        sum[1] *= w.scale(g);
        if (WEIGHT::HAS_MINS && in_block % WEIGHT::GROUP == 0)
            m = w.min(g) * (WEIGHT::GROUP == 16 ? sum16(a, k / 16) : a.sum32[k / 32]);
        d = w.d();
        dmin = w.dmin();
    }
    constexpr int LANES = WEIGHT::SIZE / 8;  // that hold one block
#pragma unroll
    for (int n = LANES / 2; n; n /= 2) {
        sum[0] += shuffle_xor(sum[0], n);
        sum[1] += shuffle_xor(sum[1], n);
        if (WEIGHT::HAS_MINS) m += shuffle_xor(m, n);
    }
    float u = mul(d, join_planes(sum[0], sum[1]));
    if (WEIGHT::HAS_MINS) u = sub(u, mul(dmin, float(m)));
    if (LANES == WARP) return u;
    float t = 0.0f;
#pragma unroll
    for (int b = 0; b < WARP / LANES; b++) t = add(t, shuffle(u, b * LANES));
    return t;
}

KERNEL(THREADS) matmul(const uint8* weights, int64 matrix_bytes, const Act* x, int supers,
                       const int* order, const int* offset, int divide, int items,
                       float* y, int rows, int row_stride, int blocks) {
    Items at(order, offset, divide, items);
    int row = blockIdx.x * (THREADS / WARP) + warp_id();
    if (row >= rows) return;
    constexpr int PER_SUPER = SUPER / WEIGHT::SIZE;
    const uint8* from =
        weights + blockIdx.y * matrix_bytes + int64(row) * blocks * WEIGHT::BYTES;
    int my_block = 8 * lane_id() / WEIGHT::SIZE;
    for (int base = at.begin + blockIdx.z * CHUNK; base < at.end; base += gridDim.z * CHUNK) {
        int n = min(CHUNK, at.end - base);
        float sum[CHUNK] = {};
        for (int s = 0; s < supers; s++) {
            int block = s * PER_SUPER + my_block;
            WEIGHT w;
            w.b = from + int64(block) * WEIGHT::BYTES;
#pragma unroll
            for (int i = 0; i < CHUNK; i++) {
                if (i >= n) break;
                const Act& a = x[int64(at.input(base + i)) * supers + s];
                sum[i] = add(sum[i], mul(a.d, superblock(w, block < blocks, a)));
            }
        }
#pragma unroll
        for (int i = 0; i < CHUNK; i++)
            if (i < n && lane_id() == 0)
                y[int64(at.output(base + i)) * row_stride + row] = sum[i];
    }
}
#endif

#ifdef FLOATS
// A row a block: thread j is lane j of sum256.
KERNEL(THREADS) matmul(const uint8* weights, int64 matrix_bytes, const float* x, int columns,
                       const int* order, const int* offset, int divide, int items,
                       float* y, int row_stride) {
    __shared__ float buffer[CHUNK][SUPER];
    Items at(order, offset, divide, items);
    const uint8* matrix = weights + blockIdx.y * matrix_bytes;
    int64 row = int64(blockIdx.x) * columns;
    for (int base = at.begin + blockIdx.z * CHUNK; base < at.end; base += gridDim.z * CHUNK) {
        int n = min(CHUNK, at.end - base);
        float sum[CHUNK] = {};
        for (int k = threadIdx.x; k < columns; k += THREADS) {
            float w = load_float(matrix, row + k, WEIGHT);
#pragma unroll
            for (int i = 0; i < CHUNK; i++)
                if (i < n) {
                    float v = x[int64(at.input(base + i)) * columns + k];
                    sum[i] = add(sum[i], mul(w, v));
                }
        }
        __syncthreads();
        for (int i = 0; i < n; i++) {
            float total = block_tree(sum[i], buffer[i]);
            if (threadIdx.x == 0) y[int64(at.output(base + i)) * row_stride + blockIdx.x] = total;
        }
    }
}
#endif
