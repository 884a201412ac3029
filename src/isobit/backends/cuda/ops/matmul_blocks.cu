// y = W x for every quantised format from the file's bytes (docs/numerics.md, section 4). WEIGHT: a
// block format of formats.cuh or few_bits.cuh.
#include "few_bits.cuh"
#include "sorted_pairs.cuh"

// A row a warp; a lane holds 8 values of each superblock.
DEV void dot8(int2 codes, const ActivationBlock& a, int k, int (&sum)[2]) {
#pragma unroll
    for (int p = 0; p < PLANES; p++) {
        int2 x = *reinterpret_cast<const int2*>(a.plane[p] + k);
        sum[p] = dp4a(codes.y, x.y, dp4a(codes.x, x.x, 0));
    }
}

// One superblock of one row with one activation: t_s, the same in every lane.
DEV float superblock(const WEIGHT& w, bool held, const ActivationBlock& a) {
    int k = 8 * lane_id(), in_block = k % WEIGHT::SIZE, g = in_block / WEIGHT::GROUP;
    int sum[2] = {0, 0}, m = 0;
    float d = 0.0f, dmin = 0.0f;
    if (held) {
        dot8(make_int2(w.codes(in_block), w.codes(in_block + 4)), a, k, sum);
        sum[0] *= w.scale(g);
        sum[1] *= w.scale(g);
        if (WEIGHT::HAS_MINS && in_block % WEIGHT::GROUP == 0)
            m = w.min(g) * (WEIGHT::GROUP == 16 ? a.sum16[k / 16] : a.sum32[k / 32]);
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
    float u = mul(d, combine_planes(sum[0], sum[1]));
    if (WEIGHT::HAS_MINS) u = sub(u, mul(dmin, float(m)));
    if (LANES == WARP) return u;
    float t = 0.0f;
#pragma unroll
    for (int b = 0; b < WARP / LANES; b++) t = add(t, shuffle(u, b * LANES));
    return t;
}

KERNEL(THREADS) matmul_blocks(const uint8* weights, int64 matrix_bytes, const ActivationBlock* x, int supers,
                              const int* sorted_pairs, const int* expert_offsets, int top_k, int pairs,
                              float* y, int rows, int row_stride, int columns) {
    begin();
    SortedPairs at(sorted_pairs, expert_offsets, top_k, pairs);
    int row = blockIdx.x * (THREADS / WARP) + warp_id();
    if (row >= rows) return;
    constexpr int PER_SUPER = SUPER / WEIGHT::SIZE;
    int blocks = columns / WEIGHT::SIZE;
    const uint8* from = weights + blockIdx.y * matrix_bytes
                        + int64(row) * (blocks / PARTS<WEIGHT>) * WEIGHT::BYTES;
    int my_block = 8 * lane_id() / WEIGHT::SIZE;
    for (int base = at.begin + blockIdx.z * CHUNK; base < at.end; base += gridDim.z * CHUNK) {
        int n = min(CHUNK, at.end - base);
        float sum[CHUNK] = {};
        for (int s = 0; s < supers; s++) {
            int block = s * PER_SUPER + my_block;
            WEIGHT w = block_at<WEIGHT>(from, block);
#pragma unroll
            for (int i = 0; i < CHUNK; i++) {
                if (i >= n) break;
                const ActivationBlock& a = x[int64(at.input(base + i)) * supers + s];
                sum[i] = add(sum[i], mul(a.d, superblock(w, block < blocks, a)));
            }
        }
#pragma unroll
        for (int i = 0; i < CHUNK; i++)
            if (i < n && lane_id() == 0)
                y[int64(at.output(base + i)) * row_stride + row] = sum[i];
    }
}
