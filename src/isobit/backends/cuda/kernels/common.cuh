// What every kernel shares: types, reductions in the written order, and quantised activations.
// Kernels are compiled by NVRTC without -fmad; scalar.h holds the scalar arithmetic.
#pragma once
#include "scalar.h"

#ifndef PLANES
#define PLANES 2  // signed bytes an activation is kept in (EngineConfig.planes)
#endif
#ifndef EMULATED
#define DEV __device__ __forceinline__
#if defined CLUSTER && __CUDA_ARCH__ >= 900  // blocks that share what they fetch
#define CLUSTERED __cluster_dims__(CLUSTER, 1, 1)
#else
#define CLUSTERED
#endif
#ifdef BESIDE  // threads that each of AT_ONCE blocks leaves registers for besides
#define KERNEL(threads) extern "C" __global__ void CLUSTERED __launch_bounds__(threads + BESIDE, AT_ONCE)
#elif defined AT_ONCE  // blocks that a multiprocessor has registers for
#define KERNEL(threads) extern "C" __global__ void CLUSTERED __launch_bounds__(threads, AT_ONCE)
#else
#define KERNEL(threads) extern "C" __global__ void __launch_bounds__(threads)
#endif
#ifndef SHARED_ALIGNMENT
#define SHARED_ALIGNMENT 16
#endif
#define DYNAMIC_SHARED(type, name) \
    extern __shared__ __align__(SHARED_ALIGNMENT) unsigned char dynamic_shared[]; \
    type* name = reinterpret_cast<type*>(dynamic_shared)
#endif

typedef signed char int8;
typedef unsigned char uint8;
typedef unsigned short uint16;
typedef unsigned int uint32;
typedef long long int64;
typedef unsigned long long uint64;

using isobit::add;
using isobit::bits;
using isobit::div;
using isobit::mul;
using isobit::sub;

constexpr int WARP = 32;
constexpr int THREADS = 256;  // of a block, unless a kernel says otherwise; sum256 has 256 lanes
constexpr int SUPER = 256;    // values in a superblock
constexpr int KV_PAGE = 64;      // keys in a tile, positions in a page

// One superblock of activations: the planes, and the integer sums that mins need.
// 656 bytes: eight lanes that read eight blocks at one offset meet no shared-memory bank twice.
struct __align__(16) ActivationBlock {
    int8 plane[2][SUPER];  // high, low; with one plane the second is unused
    int8 digits[3][8];     // sum32 as d0 + 256 d1 + 65536 d2, for tensor cores; not in every block
    float d;
    int unused;            // what tensor cores read ends here
    int sum32[8];          // sum of q over 32 values
    int sum16[16];         // over 16
    int unused_too[4];
};
static_assert(sizeof(ActivationBlock) == 656, "ActivationBlock is also known to layout.py");

// Of what is not negative: shorter than a division of signed numbers.
DEV int quotient(int a, int b) { return int(uint32(a) / uint32(b)); }

DEV float sigmoid(float x) { return div(1.0f, add(1.0f, isobit::exp(-x))); }

// Of N values with that sum. To multiply by the inverse of a power of two is to divide by it, and sooner done.
template <int N>
DEV float mean_of(float sum) {
    return N & (N - 1) ? div(sum, float(N)) : mul(sum, 1.0f / N);
}

DEV int lane_id() { return threadIdx.x % WARP; }
DEV int warp_id() { return threadIdx.x / WARP; }

#ifndef EMULATED
DEV float half_to_float(uint16 h) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
    return f;
}
DEV float square_root(float x) { return __fsqrt_rn(x); }
DEV int dp4a(int a, int b, int c) { return __dp4a(a, b, c); }
DEV int dp4a(uint32 a, int b, int c) {
    int sum;
    asm("dp4a.u32.s32 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(b), "r"(c));
    return sum;
}
// Byte i of four, with its sign. Pick 8 + i is the sign of byte i eight times; __byte_perm drops its 8.
DEV int signed_byte_of(int word, int i) {
    int byte;
    asm("prmt.b32 %0, %1, 0, %2;" : "=r"(byte) : "r"(word), "r"(0x8880 + 0x1111 * i));
    return byte;
}
// Two 16-bit a times the lower, or upper, two of four bytes b.
DEV int dp2a_lo(int a, int b, int c) { return __dp2a_lo(a, b, c); }
DEV int dp2a_hi(int a, int b, int c) { return __dp2a_hi(a, b, c); }
DEV int warp_sum(int v) { return __reduce_add_sync(~0u, v); }
DEV uint32 warp_max(uint32 v) { return __reduce_max_sync(~0u, v); }
// A read of bytes that are used once in a pass: weights.
template <class T>
DEV T load_once(const T* p) {
    return __ldcs(p);
}
// A read past the multiprocessor's own cache, of what other blocks of this kernel wrote.
template <class T>
DEV T load_fresh(const T* p) {
    return __ldcg(p);
}
// Of kernels launched to overlap: wait until all that was queued ahead has ended, and let the next
// kernel start.
DEV void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
DEV void let_next_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
// An address, or null, that is made here, and not where it is used: before a kernel waits, when there is time. Only
// something that depends on it keeps the compiler from making it later.
template <class T>
DEV T* at_hand(T* p) {
    asm volatile("{\n.reg .pred none;\nsetp.eq.u64 none, %0, 1;\n@none trap;\n}" ::"l"(p));
    return p;
}
// A word between blocks that run at once.
DEV uint64 load_relaxed(const uint64* p) {
    uint64 v;
    asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(v) : "l"(p) : "memory");
    return v;
}
DEV void store_relaxed(uint64* p, uint64 v) {
    asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(p), "l"(v) : "memory");
}
#endif

// What a kernel starts with that may be launched to overlap, and has nothing to do ahead of time. The next
// kernel starts when what was queued ahead has ended, so that this may be known to it (PLANNED of
// batch_matmul.cu).
DEV void begin() {
    wait_for_previous();
    let_next_start();
}

template <class T>
DEV T shuffle(T v, int from) {
    return __shfl_sync(~0u, v, from);
}
template <class T>
DEV T shuffle_xor(T v, int distance) {
    return __shfl_xor_sync(~0u, v, distance);
}

// The largest of the lanes' floats, as integers that are ordered as the floats are.
DEV float warp_max(float v) {
    uint32 b = bits(v);
    b = warp_max(b >> 31 ? ~b : b | 0x80000000u);
    return isobit::from_bits(b >> 31 ? b & 0x7fffffffu : ~b);
}

// tree() of section 2 over the 32 lanes; every lane gets the sum.
DEV float warp_tree(float v) {
    for (int n = 16; n; n /= 2) v = add(v, shuffle_xor(v, n));
    return v;
}

// tree() over 256 lanes, of which a warp's lane l holds l, l + 32, … l + 224; every lane gets the sum.
DEV float tree256(const float (&v)[8]) {
    float even = add(add(v[0], v[4]), add(v[2], v[6]));
    float odd = add(add(v[1], v[5]), add(v[3], v[7]));
    return warp_tree(add(even, odd));
}
// The same of 256 lanes in shared memory.
DEV float buffer_tree(const float* buffer) {
    float v[8];
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] = buffer[lane_id() + WARP * i];
    return tree256(v);
}
// The same, lane i held by thread i; every thread gets the sum. buffer: shared, 256.
DEV float block_tree(float v, float* buffer) {
    buffer[threadIdx.x] = v;
    __syncthreads();
    return buffer_tree(buffer);
}

DEV uint32 block_max(uint32 v, uint32* buffer) {
    v = warp_max(v);
    if (lane_id() == 0) buffer[warp_id()] = v;
    __syncthreads();
    return warp_max(lane_id() < int(blockDim.x) / WARP ? buffer[lane_id()] : 0u);
}

// Eight values that begin at a multiple of 16 bytes.
DEV void load8(const float* from, float (&v)[8]) {
    float4 a = reinterpret_cast<const float4*>(from)[0], b = reinterpret_cast<const float4*>(from)[1];
    v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w, v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
}
DEV void store8(float* to, const float (&v)[8]) {
    reinterpret_cast<float4*>(to)[0] = make_float4(v[0], v[1], v[2], v[3]);
    reinterpret_cast<float4*>(to)[1] = make_float4(v[4], v[5], v[6], v[7]);
}
// Eight values anywhere, of which `count` are there; the others are 0.
DEV void load8(const float* from, int count, float (&v)[8]) {
    if (count >= 8 && reinterpret_cast<uint64>(from) % 16 == 0) {
        load8(from, v);
    } else {
#pragma unroll
        for (int i = 0; i < 8; i++) v[i] = i < count ? from[i] : 0.0f;
    }
}

DEV uint32 magnitude(float x) { return bits(x) & 0x7fffffffu; }

DEV int quantised(float x, isobit::BlockScale s) {
    return s.r == 0.0f ? 0 : isobit::quantise(x, s.r);
}

// The lowest bytes of four integers, which are their isobit::low_plane.
DEV int pack_bytes(int a, int b, int c, int d) {
    return __byte_perm(__byte_perm(a, b, 0x0040), __byte_perm(c, d, 0x0040), 0x5410);
}
// Their isobit::high_plane.
DEV int pack_high(int a, int b, int c, int d) {
    return __byte_perm(__byte_perm(a + 128, b + 128, 0x0051), __byte_perm(c + 128, d + 128, 0x0051), 0x5410);
}

// Section 3, by one warp: lane l holds values 8l … 8l+7 of the superblock. The sum is of the lane's.
struct QuantisedLane {
    int sum;
    float d;
};
DEV QuantisedLane quantise_planes(const float (&x)[8], int8 (*plane)[SUPER]) {
    uint32 amax = 0;
    for (int i = 0; i < 8; i++) amax = max(amax, magnitude(x[i]));
    isobit::BlockScale scale = isobit::block_scale(warp_max(amax), PLANES);
    int q[8];
    QuantisedLane of = {0, scale.d};
    for (int i = 0; i < 8; i++) {
        q[i] = quantised(x[i], scale);
        of.sum += q[i];
    }
    int lane = lane_id();
    int2 bytes = make_int2(pack_bytes(q[0], q[1], q[2], q[3]), pack_bytes(q[4], q[5], q[6], q[7]));
    int2 high = make_int2(pack_high(q[0], q[1], q[2], q[3]), pack_high(q[4], q[5], q[6], q[7]));
    reinterpret_cast<int2*>(plane[0])[lane] = PLANES == 2 ? high : bytes;
    reinterpret_cast<int2*>(plane[1])[lane] = PLANES == 2 ? bytes : make_int2(0, 0);
    return of;
}
// The sum over 32 values as digits for tensor cores; by all lanes.
DEV void store_digits(int sum, int8 (*digits)[8]) {
    int three = (sum + 0x808080) ^ 0x808080;  // of a sum that fits 21 bits
    if (lane_id() % 4 == 0)
        for (int i = 0; i < 3; i++) digits[i][lane_id() / 4] = int8(three >> 8 * i);
}

// `out` keeps the digits it had: for products without tensor cores, which do not read them. Returns
// sum32[lane / 4].
DEV int quantise_without_digits(const float (&x)[8], ActivationBlock* out) {
    QuantisedLane of = quantise_planes(x, out->plane);
    int lane = lane_id();
    of.sum += shuffle_xor(of.sum, 1);
    if (lane % 2 == 0) out->sum16[lane / 2] = of.sum;
    of.sum += shuffle_xor(of.sum, 2);
    if (lane % 4 == 0) out->sum32[lane / 4] = of.sum;
    if (lane == 0) out->d = of.d;
    return of.sum;
}
// The whole block.
DEV void quantise_superblock(const float (&x)[8], ActivationBlock* out) {
    store_digits(quantise_without_digits(x, out), out->digits);
}

// f(H) * 256 + f(L), section 4, or with one plane f(S); attention always has two, section 6. The product is
// exact, so that the fused operation's one rounding is the sum's.
template <int N = PLANES>
DEV float combine_planes(int high, int low) {
    return N == 2 ? __fmaf_rn(float(high), 256.0f, float(low)) : float(high);
}
