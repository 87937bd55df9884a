// The instructions that the kernels are made of, one function each. PTX, so that no header of the toolkit is needed.
// Everything else in the kernels is plain C++: the tests put an emulation in the place of this file and run them on a
// CPU.
#ifndef SPARSEDM_TENSOR_CORE
#define SPARSEDM_TENSOR_CORE

// Asynchronous copy of 16 bytes; where `valid` is false the destination is filled with zeros and nothing is read.
__device__ __forceinline__ void copy_async(unsigned shared, const void* global, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(valid ? 16 : 0));
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Wait until at most `PENDING` of this thread's latest groups of copies are under way.
template <int PENDING>
__device__ __forceinline__ void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

__device__ __forceinline__ void load_shared(unsigned (&r)[4], unsigned shared) {
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared)
                 : "memory");
}

__device__ __forceinline__ unsigned load_shared(unsigned shared) {
    unsigned r;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(r) : "r"(shared) : "memory");
    return r;
}

// Four 8x8 matrices of 16-bit elements; lane i gives the address of row i % 8 of matrix i / 8.
__device__ __forceinline__ void load_matrices(unsigned (&r)[4], unsigned shared) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared)
                 : "memory");
}

#if BFLOAT16
#define ELEMENT "bf16"
#else
#define ELEMENT "f16"
#endif

// c += a @ b, a 16 x 32 with 2:4 sparsity, b 32 x 8. SELECTOR names the lanes whose metadata counts.
template <int SELECTOR>
__device__ __forceinline__ void multiply_sparse(
    float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[4], unsigned metadata
) {
    asm volatile("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32." ELEMENT "." ELEMENT ".f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]),
                   "r"(metadata), "n"(SELECTOR));
}

// Two 16-bit floats in a word, the first in the low half.
__device__ __forceinline__ void widen(unsigned word, float& first, float& second) {
#if BFLOAT16
    first = __uint_as_float(word << 16);
    second = __uint_as_float(word & 0xffff0000u);
#else
    asm("{.reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}"
        : "=f"(first), "=f"(second)
        : "r"(word));
#endif
}

__device__ __forceinline__ unsigned narrow(float first, float second) {
    unsigned word;
#if BFLOAT16
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
#else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
#endif
    return word;
}

#endif
