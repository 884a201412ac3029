// int8 tensor-core products, in PTX.
#pragma once
#include "copy.cuh"

#ifndef EMULATED
// Four 8 x 16-byte matrices: lane l gives the address of row l % 8 of matrix l / 8.
DEV void load_matrices(int (&r)[4], SharedAddress address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address));
}

// c += A B over 32 values: A 16 x 32, B 32 x 8. With g = lane / 4 and t = lane % 4, the lane holds
// a: rows g, g+8, g, g+8 at values 4t, 4t, 4t+16, 4t+16; b: column g at values 4t and 4t+16;
// c: rows g, g, g+8, g+8 at columns 2t, 2t+1, 2t, 2t+1.
DEV void product32(int (&c)[4], const int (&a)[4], int b0, int b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// The same of bytes a without signs.
DEV void product32(int (&c)[4], const uint32 (&a)[4], int b0, int b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// c += A B over 16 values: a0, a1 hold rows g and g+8 at values 4t, b column g at values 4t.
DEV void product16(int (&c)[4], int a0, int a1, int b) {
    asm("mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
        "{%0, %1, %2, %3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a0), "r"(a1), "r"(b));
}
#endif
