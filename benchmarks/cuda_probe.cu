// Ingredients of the decode step, timed apart: reading tiles, grid barriers, shared-memory patterns.
#include "tiles.cuh"

#ifndef BLOCK
#define BLOCK 512
#endif
constexpr int WARPS = BLOCK / WARP;
typedef unsigned long long uint64_;

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

KERNEL(BLOCK) read_plain(const int4* w, int64 n, int* out) {
    let_next_start();
    int4 s = {0, 0, 0, 0};
    int64 stride = int64(gridDim.x) * BLOCK;
    int64 i = int64(blockIdx.x) * BLOCK + threadIdx.x;
    for (; i < n; i += 8 * stride) {
        int4 v[8];
#pragma unroll
        for (int k = 0; k < 8; k++) v[k] = i + k * stride < n ? load_once(w + i + k * stride) : s;
#pragma unroll
        for (int k = 0; k < 8; k++) s.x ^= v[k].x, s.y ^= v[k].y, s.z ^= v[k].z, s.w ^= v[k].w;
    }
    if ((s.x ^ s.y ^ s.z ^ s.w) == 0x12345) *out = 1;
}

// One matrix of `groups` groups of 8 rows, `supers` superblocks each; groups dealt to the blocks.
struct GemvShared {
    ActivationBlock x[16];
    float part[4096];
};
template <class W>
DEV void gemv(const uint8* w, const ActivationBlock* x, float* y, int groups, int supers, GemvShared* sh) {
    int mine = (groups - int(blockIdx.x) + int(gridDim.x) - 1) / int(gridDim.x);
    int tiles = mine * supers, row = lane_id() % 8, sub = lane_id() / 8;
    auto tile = [&](int j) {
        int unit = j / supers;
        return w + (int64(blockIdx.x + unit * gridDim.x) * supers + j % supers) * W::TILE_BYTES;
    };
    W now;
    int j = 4 * warp_id() + sub;
    if (j < tiles) now.load(tile(j), row);
    let_next_start();
    wait_for_previous();
    for (int i = threadIdx.x; i < supers * int(sizeof(ActivationBlock) / 16); i += BLOCK)
        reinterpret_cast<int4*>(sh->x)[i] = reinterpret_cast<const int4*>(x)[i];
    __syncthreads();
    for (; j < tiles; ) {
        int k = j + 4 * WARPS;
        W next;
        if (k < tiles) next.load(tile(k), row);
        const ActivationBlock& a = sh->x[j % supers];
        sh->part[j * 8 + row] = mul(a.d, now.dot(a));
        now = next;
        j = k;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < mine * 8; i += BLOCK) {
        float sum = 0.0f;
        const float* p = sh->part + i / 8 * supers * 8 + i % 8;
        for (int s = 0; s < supers; s++) sum = add(sum, p[8 * s]);
        y[int(blockIdx.x + i / 8 * gridDim.x) * 8 + i % 8] = sum;
    }
}
KERNEL(BLOCK) gemv_q4(const uint8* w, const ActivationBlock* x, float* y, int groups, int supers) {
    DYNAMIC_SHARED(GemvShared, sh);
    gemv<TiledQ4_K>(w, x, y, groups, supers, sh);
}
KERNEL(BLOCK) gemv_q6(const uint8* w, const ActivationBlock* x, float* y, int groups, int supers) {
    DYNAMIC_SHARED(GemvShared, sh);
    gemv<TiledQ6_K>(w, x, y, groups, supers, sh);
}

#ifndef DEPTH
#define DEPTH 2
#endif
// The same through slots in shared memory: copies of 16 bytes a lane, or bulk copies of whole tiles.
DEV void bulk_copy(void* to, const void* from, uint32 bytes, uint64_* barrier) {
#if __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 ::"r"(shared_address(to)), "l"(from), "r"(bytes), "r"(shared_address(barrier)) : "memory");
#endif
}
DEV void barrier_init(uint64_* b) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(b)) : "memory");
#if __CUDA_ARCH__ >= 900
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}
DEV void barrier_expect(uint64_* b, uint32 bytes) {
#if __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(b)), "r"(bytes) : "memory");
#endif
}
DEV void barrier_wait(uint64_* b, uint32 parity) {
#if __CUDA_ARCH__ >= 900
    asm volatile("{\n.reg .pred p;\nAGAIN:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@p bra DONE;\nbra AGAIN;\nDONE:\n}"
                 ::"r"(shared_address(b)), "r"(parity) : "memory");
#endif
}
template <class W, bool BULK>
DEV void gemv_slots(const uint8* w, const ActivationBlock* x, float* y, int groups, int supers, uint8* mem) {
    constexpr int SLOT = 4 * W::TILE_BYTES;
    ActivationBlock* acts = reinterpret_cast<ActivationBlock*>(mem);
    uint64_* barriers = reinterpret_cast<uint64_*>(mem + supers * sizeof(ActivationBlock));
    uint8* slots = mem + supers * sizeof(ActivationBlock) + 16 * 8 * 8;
    float* part = reinterpret_cast<float*>(slots + WARPS * DEPTH * SLOT);
    int mine = (groups - int(blockIdx.x) + int(gridDim.x) - 1) / int(gridDim.x);
    int tiles = mine * supers, row = lane_id() % 8, sub = lane_id() / 8, fetched = 0;
    auto tile = [&](int j) {
        int unit = j / supers;
        return w + (int64(blockIdx.x + unit * gridDim.x) * supers + j % supers) * W::TILE_BYTES;
    };
    auto slot = [&](int step) { return slots + (step % DEPTH * WARPS + warp_id()) * SLOT; };
    auto bar = [&](int step) { return barriers + warp_id() * 8 + step % DEPTH; };
    auto fetch = [&]() {
        int j = 4 * (fetched * WARPS + warp_id());
        if (BULK) {
            if (j < tiles) {
                if (lane_id() == 0) barrier_expect(bar(fetched), min(4, tiles - j) * W::TILE_BYTES);
                __syncwarp();
                if (lane_id() < 4 && j + lane_id() < tiles)
                    bulk_copy(slot(fetched) + lane_id() * W::TILE_BYTES, tile(j + lane_id()), W::TILE_BYTES, bar(fetched));
            }
        } else {
            if (j + sub < tiles) W::fetch(tile(j + sub), row, slot(fetched));
            commit_copies();
        }
        fetched++;
    };
    if (BULK) {
        if (lane_id() < DEPTH) barrier_init(barriers + warp_id() * 8 + lane_id());
        __syncwarp();
    }
    for (int i = 0; i < DEPTH; i++) fetch();
    let_next_start();
    wait_for_previous();
    for (int i = threadIdx.x; i < supers * int(sizeof(ActivationBlock) / 16); i += BLOCK)
        reinterpret_cast<int4*>(acts)[i] = reinterpret_cast<const int4*>(x)[i];
    __syncthreads();
    for (int step = 0; 4 * (step * WARPS + warp_id()) < tiles; step++) {
        int j = 4 * (step * WARPS + warp_id()) + sub;
        if (BULK) barrier_wait(bar(step), step / DEPTH & 1);
        else wait_copies<DEPTH - 1>();
        __syncwarp();
        if (j < tiles) {
            W now;
            if (BULK) now.load_tile(slot(step) + sub * W::TILE_BYTES, row);
            else now.load_slot(slot(step));
            const ActivationBlock& a = acts[j % supers];
            part[j * 8 + row] = mul(a.d, now.dot(a));
        }
        __syncwarp();
        fetch();
    }
    __syncthreads();
    for (int i = threadIdx.x; i < mine * 8; i += BLOCK) {
        float sum = 0.0f;
        const float* p = part + i / 8 * supers * 8 + i % 8;
        for (int s = 0; s < supers; s++) sum = add(sum, p[8 * s]);
        y[int(blockIdx.x + i / 8 * gridDim.x) * 8 + i % 8] = sum;
    }
}
KERNEL(BLOCK) lanes_q4(const uint8* w, const ActivationBlock* x, float* y, int groups, int supers) {
    DYNAMIC_SHARED(uint8, mem);
    gemv_slots<TiledQ4_K, false>(w, x, y, groups, supers, mem);
}
KERNEL(BLOCK) lanes_q6(const uint8* w, const ActivationBlock* x, float* y, int groups, int supers) {
    DYNAMIC_SHARED(uint8, mem);
    gemv_slots<TiledQ6_K, false>(w, x, y, groups, supers, mem);
}
KERNEL(BLOCK) bulk_q4(const uint8* w, const ActivationBlock* x, float* y, int groups, int supers) {
    DYNAMIC_SHARED(uint8, mem);
    gemv_slots<TiledQ4_K, true>(w, x, y, groups, supers, mem);
}
KERNEL(BLOCK) bulk_q6(const uint8* w, const ActivationBlock* x, float* y, int groups, int supers) {
    DYNAMIC_SHARED(uint8, mem);
    gemv_slots<TiledQ6_K, true>(w, x, y, groups, supers, mem);
}

// Compute alone: one tile's registers times the activations again and again (cycles a product).
template <class W, int DISTINCT>
DEV void dots(const uint8* w, const ActivationBlock* x, int rounds, float* y, int64* cycles, GemvShared* sh) {
    for (int i = threadIdx.x; i < 16 * int(sizeof(ActivationBlock) / 16); i += BLOCK)
        reinterpret_cast<int4*>(sh->x)[i] = reinterpret_cast<const int4*>(x)[i];
    W now;
    now.load(w + warp_id() * W::TILE_BYTES, lane_id() % 8);
    __syncthreads();
    float sum = 0.0f;
    int64 start = clock64();
    int s = DISTINCT == 1 ? 0 : lane_id() / 8;
    for (int i = 0; i < rounds; i++) {
        const ActivationBlock& a = sh->x[s];
        sum = add(sum, mul(a.d, now.dot(a)));
        s = (s + 4) & 15;
        __syncwarp();
    }
    __syncthreads();
    if (threadIdx.x == 0) cycles[blockIdx.x] = clock64() - start;
    y[blockIdx.x * BLOCK + threadIdx.x] = sum;
}
KERNEL(BLOCK) dots_q4_4(const uint8* w, const ActivationBlock* x, int rounds, float* y, int64* cycles) {
    DYNAMIC_SHARED(GemvShared, sh);
    dots<TiledQ4_K, 4>(w, x, rounds, y, cycles, sh);
}
KERNEL(BLOCK) dots_q4_1(const uint8* w, const ActivationBlock* x, int rounds, float* y, int64* cycles) {
    DYNAMIC_SHARED(GemvShared, sh);
    dots<TiledQ4_K, 1>(w, x, rounds, y, cycles, sh);
}
KERNEL(BLOCK) dots_q6_4(const uint8* w, const ActivationBlock* x, int rounds, float* y, int64* cycles) {
    DYNAMIC_SHARED(GemvShared, sh);
    dots<TiledQ6_K, 4>(w, x, rounds, y, cycles, sh);
}
KERNEL(BLOCK) dots_q6_1(const uint8* w, const ActivationBlock* x, int rounds, float* y, int64* cycles) {
    DYNAMIC_SHARED(GemvShared, sh);
    dots<TiledQ6_K, 1>(w, x, rounds, y, cycles, sh);
}

// Grid barriers. One block a multiprocessor; `count` starts at 0.
DEV uint32 load_acquire(const uint32* p) {
    uint32 v;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}
DEV void add_release(uint32* p, uint32 n) {
    asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(p), "r"(n) : "memory");
}
DEV void barrier(uint32* count, uint32 target) {
    __syncthreads();
    if (threadIdx.x == 0) {
        add_release(count, 1);
        while (load_acquire(count) < target) {}
    }
    __syncthreads();
}
// Every warp polls for itself: no block barrier after the wait.
DEV void barrier_by_warp(uint32* count, uint32 target) {
    __syncthreads();
    if (threadIdx.x == 0) add_release(count, 1);
    if (lane_id() == 0)
        while (load_acquire(count) < target) {}
    __syncwarp();
}
KERNEL(BLOCK) barriers(uint32* count, int rounds, int64* cycles) {
    int64 start = clock64();
    for (int i = 1; i <= rounds; i++) barrier(count, i * gridDim.x);
    if (threadIdx.x == 0) cycles[blockIdx.x] = clock64() - start;
}
KERNEL(BLOCK) barriers_by_warp(uint32* count, int rounds, int64* cycles) {
    int64 start = clock64();
    for (int i = 1; i <= rounds; i++) barrier_by_warp(count, i * gridDim.x);
    if (threadIdx.x == 0) cycles[blockIdx.x] = clock64() - start;
}
// A barrier, then 8 KB that the blocks wrote before it, read by every block into shared memory.
KERNEL(BLOCK) barriers_and_vector(uint32* count, int rounds, float* x, int n, float* y,
                                  int64* cycles) {
    __shared__ float v[4096];
    int64 start = clock64();
    for (int i = 1; i <= rounds; i++) {
        float* to = x + i % 2 * n;
        for (int k = blockIdx.x * 16 + threadIdx.x; threadIdx.x < 16 && k < n; k += 16 * gridDim.x)
            __stcg(to + k, float(i + k));
        barrier(count, i * gridDim.x);
        for (int k = threadIdx.x; k < n / 4; k += BLOCK)
            reinterpret_cast<float4*>(v)[k] = __ldcg(reinterpret_cast<const float4*>(to) + k);
        __syncthreads();
    }
    if (threadIdx.x == 0) cycles[blockIdx.x] = clock64() - start;
    y[blockIdx.x * BLOCK + threadIdx.x] = v[threadIdx.x];
}
// A value with its number beside it: readers wait for the data itself, there is no counter.
KERNEL(BLOCK) tagged_vector(int rounds, uint2* x, int n, float* y, int64* cycles) {
    __shared__ float v[4096];
    int64 start = clock64();
    for (int i = 1; i <= rounds; i++) {
        uint2* to = x + i % 2 * n;
        for (int k = blockIdx.x * 16 + threadIdx.x; threadIdx.x < 16 && k < n; k += 16 * gridDim.x)
            asm volatile("st.relaxed.gpu.global.v2.u32 [%0], {%1, %2};" ::"l"(to + k), "r"(i + k), "r"(i) : "memory");
        for (int k = threadIdx.x; k < n; k += BLOCK) {
            uint32 value, tag;
            do {
                asm volatile("ld.relaxed.gpu.global.v2.u32 {%0, %1}, [%2];" : "=r"(value), "=r"(tag) : "l"(to + k) : "memory");
            } while (tag != uint32(i));
            v[k] = isobit::from_bits(value);
        }
        __syncthreads();
    }
    if (threadIdx.x == 0) cycles[blockIdx.x] = clock64() - start;
    y[blockIdx.x * BLOCK + threadIdx.x] = v[threadIdx.x];
}
KERNEL(BLOCK) nothing(int* out) {
    let_next_start();
    wait_for_previous();
    if (threadIdx.x == 9999) *out = 1;
}
