// The instructions of Hopper: warpgroups, whose four warps multiply at once, asynchronously, and take activations from
// shared memory; and the copy engine (TMA), which needs one thread to move a whole tile. Replaced in the tests, as
// tensor_core.cuh is.
#ifndef SPARSEDM_WARPGROUP
#define SPARSEDM_WARPGROUP
#include "tensor_core.cuh"

// Make what this thread wrote into shared memory visible to tensor cores and copy engine.
__device__ __forceinline__ void show_to_engines() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// A barrier in shared memory whose phase ends once its one announcement was made and all bytes announced have arrived.
__device__ __forceinline__ void create_barrier(unsigned barrier) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void announce_bytes(unsigned barrier, unsigned bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Wait until the phase of this parity has ended; the first phase has parity 0.
__device__ __forceinline__ void wait_bytes(unsigned barrier, unsigned parity) {
    asm volatile(
        "{.reg .pred ended;"
        "again: mbarrier.try_wait.parity.shared::cta.b64 ended, [%0], %1;"
        "@!ended bra again;}" ::"r"(barrier), "r"(parity)
        : "memory"
    );
}

// Copy `bytes` (a multiple of 16, as are both addresses) and tell `barrier`.
__device__ __forceinline__ void copy_bulk(unsigned shared, const void* global, unsigned bytes, unsigned barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared),
        "l"(global), "r"(bytes), "r"(barrier)
        : "memory"
    );
}

// A matrix as the copy engine knows it: made by tensor_map.py, box and swizzle included.
struct __align__(64) TensorMap {
    char opaque[128];
};

// Copy the box whose first element is `column` of `row`, zeros where it leaves the matrix, and tell `barrier`; always a
// whole box of bytes. `map` must be a __grid_constant__ parameter.
__device__ __forceinline__ void copy_box(unsigned shared, const TensorMap& map, int column, int row, unsigned barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::
            "r"(shared), "l"(&map), "r"(column), "r"(row), "r"(barrier)
        : "memory"
    );
}

// Order this warpgroup's register accesses before the products that follow.
__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Wait until at most PENDING of the latest groups of products are under way.
template <int PENDING>
__device__ __forceinline__ void wait_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// A barrier of the 128 threads of a warpgroup; barrier 0 is __syncthreads.
__device__ __forceinline__ void sync_warpgroup() {
    asm volatile("bar.sync %0, 128;" ::"r"(1 + threadIdx.x / 128) : "memory");
}

// Where `b` lies: rows of 128 bytes, K contiguous, column c of row r at c ^ (r % 8). PTX ISA, "matrix descriptor":
// address / 16, then the stride between groups of eight rows / 16 from bit 32, swizzle mode 1 (128 bytes) from bit 62.
__device__ __forceinline__ unsigned long long describe(unsigned shared) {
    return (unsigned long long)(shared >> 4) | 1ull << 16 | 1024ull / 16 << 32 | 1ull << 62;
}

// c += a @ b, a 64 x 32 with 2:4 sparsity, 16 rows from each warp's registers, b 32 x 128. Runs until waited for: till
// then neither c nor a may be touched.
template <int SELECTOR>
__device__ __forceinline__ void multiply_sparse_group(
    float (&c)[16][1][4], const unsigned (&a)[4], unsigned long long b, unsigned metadata
) {
    asm volatile(
        "{.reg .pred accumulate; setp.eq.u32 accumulate, 0, 0;"
        "wgmma.mma_async.sp.sync.aligned.m64n128k32.f32." ELEMENT "." ELEMENT " "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
        "{%64, %65, %66, %67}, %68, %69, %70, accumulate, 1, 1, 0;}"
        : "+f"(c[0][0][0]), "+f"(c[0][0][1]), "+f"(c[0][0][2]), "+f"(c[0][0][3]),
          "+f"(c[1][0][0]), "+f"(c[1][0][1]), "+f"(c[1][0][2]), "+f"(c[1][0][3]),
          "+f"(c[2][0][0]), "+f"(c[2][0][1]), "+f"(c[2][0][2]), "+f"(c[2][0][3]),
          "+f"(c[3][0][0]), "+f"(c[3][0][1]), "+f"(c[3][0][2]), "+f"(c[3][0][3]),
          "+f"(c[4][0][0]), "+f"(c[4][0][1]), "+f"(c[4][0][2]), "+f"(c[4][0][3]),
          "+f"(c[5][0][0]), "+f"(c[5][0][1]), "+f"(c[5][0][2]), "+f"(c[5][0][3]),
          "+f"(c[6][0][0]), "+f"(c[6][0][1]), "+f"(c[6][0][2]), "+f"(c[6][0][3]),
          "+f"(c[7][0][0]), "+f"(c[7][0][1]), "+f"(c[7][0][2]), "+f"(c[7][0][3]),
          "+f"(c[8][0][0]), "+f"(c[8][0][1]), "+f"(c[8][0][2]), "+f"(c[8][0][3]),
          "+f"(c[9][0][0]), "+f"(c[9][0][1]), "+f"(c[9][0][2]), "+f"(c[9][0][3]),
          "+f"(c[10][0][0]), "+f"(c[10][0][1]), "+f"(c[10][0][2]), "+f"(c[10][0][3]),
          "+f"(c[11][0][0]), "+f"(c[11][0][1]), "+f"(c[11][0][2]), "+f"(c[11][0][3]),
          "+f"(c[12][0][0]), "+f"(c[12][0][1]), "+f"(c[12][0][2]), "+f"(c[12][0][3]),
          "+f"(c[13][0][0]), "+f"(c[13][0][1]), "+f"(c[13][0][2]), "+f"(c[13][0][3]),
          "+f"(c[14][0][0]), "+f"(c[14][0][1]), "+f"(c[14][0][2]), "+f"(c[14][0][3]),
          "+f"(c[15][0][0]), "+f"(c[15][0][1]), "+f"(c[15][0][2]), "+f"(c[15][0][3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(metadata), "n"(SELECTOR)
        : "memory");
}

#endif
