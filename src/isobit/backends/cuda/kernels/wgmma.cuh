// Hopper's int8 products of warpgroups, four warps together: wgmma, in PTX.
#pragma once
#include "copy.cuh"

// Operands lie in shared memory in rows of 128 bytes, eight rows a run of 1,024 bytes, the 16-byte chunks of a
// row in an order of its own, so that no bank is met twice.
DEV int swizzled(int row, int chunk) { return 128 * row + ((chunk ^ (row & 7)) << 4); }

// A matrix there, in units of 16 bytes: so many more are so many chunks of a row, 8 the next row (whole runs).
typedef uint64 Matrix;

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
DEV Matrix matrix_at(const void* p) {
    return uint64(shared_address(p) >> 4) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}
// Before products that read or add to registers which others wrote.
DEV void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEV void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// All committed groups but the last PENDING have been computed.
template <int PENDING>
DEV void products_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}
// Nothing that reads these comes before this.
template <int N>
DEV void computed(int (&c)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+r"(c[i])::"memory");
}

#define C4(c, i) "+r"(c[i]), "+r"(c[i + 1]), "+r"(c[i + 2]), "+r"(c[i + 3])
#define C8(c, i) C4(c, i), C4(c, i + 4)
#define C16(c, i) C8(c, i), C8(c, i + 8)
#define N8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define N16 N8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define N32 \
    N16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define PRODUCT(n, type, c, a, more, b) \
    "{\n.reg .pred p;\nsetp.ne.b32 p, " more ", 0;\nwgmma.mma_async.sync.aligned.m64n" #n \
    "k32.s32." type ".s8 {" c "}, " a ", " b ", p;\n}"
#define OPERANDS(a, b, more) "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(more))
// c += A B, or = where there is nothing yet (more is false), over 32 values: A 64 x 32, a warp's 16 rows; B 32 x 2N.
// Registers as those of product32 (mma.cuh), the columns 8 at a time. A is signed, or not.
//
// No branch may lie between a product with A in registers and the wait for it: there the compiler gives these registers
// to others, although they are still read (seen with NVRTC 13.0).
DEV void product_rows(int (&c)[16], const int (&a)[4], Matrix b, bool more) {
    asm volatile(PRODUCT(32, "s8", N16, "{%16, %17, %18, %19}", "%21", "%20") : C16(c, 0) : OPERANDS(a, b, more));
}
DEV void product_rows(int (&c)[32], const uint32 (&a)[4], Matrix b, bool more) {
    asm volatile(PRODUCT(64, "u8", N32, "{%32, %33, %34, %35}", "%37", "%36") : C16(c, 0), C16(c, 16) : OPERANDS(a, b, more));
}
DEV void product_rows(int (&c)[16], const uint32 (&a)[4], Matrix b, bool more) {
    asm volatile(PRODUCT(32, "u8", N16, "{%16, %17, %18, %19}", "%21", "%20") : C16(c, 0) : OPERANDS(a, b, more));
}
DEV void product_rows(int (&c)[8], const uint32 (&a)[4], Matrix b, bool more) {
    asm volatile(PRODUCT(16, "u8", N8, "{%8, %9, %10, %11}", "%13", "%12") : C8(c, 0) : OPERANDS(a, b, more));
}
// The same, A in shared memory.
DEV void product_rows(int (&c)[32], Matrix a, Matrix b, bool more) {
    asm volatile(PRODUCT(64, "s8", N32, "%32", "%34", "%33")
                 : C16(c, 0), C16(c, 16) : "l"(a), "l"(b), "r"(int(more)));
}
// What this thread wrote to shared memory may be read by products, once others know.
DEV void written_for_products() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
#endif
