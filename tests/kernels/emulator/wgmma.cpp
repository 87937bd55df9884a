// wgmma.cu behind a C function.
#include "gpu.h"
// after gpu.h
#include "wgmma.cu"

// Pointers (for a matrix x is its map), then the bytes of values, words and x, then the kernel's integers in its order. Null, or what went wrong.
extern "C" const char* run(
    int grid_x, int grid_y, int shared, int lazy, const char* values, const char* words, const char* x,
    const long long* bytes, void* bias, void* residual, void* out, const int* n
) {
    gpu::readable = {{values, values + bytes[0]}, {words, words + bytes[1]}, {x, x + bytes[2]}};
#if CONVOLUTION
    const char* const matrix = x;
#else
    const TensorMap matrix = *(const TensorMap*)x;
#endif
    gpu::launch({grid_x, grid_y, 1}, THREADS, shared, lazy, [=] {
        sparse_gemm(
            (const uint4*)values, (const uint4*)words, matrix, (const uint4*)bias, (const uint4*)residual, (uint4*)out, n[0],
            n[1], n[2], n[3], n[4], n[5], n[6], n[7], n[8], n[9]
        );
    });
    return gpu::error.empty() ? nullptr : gpu::error.c_str();
}
