// Where the packed weights of one k step lie, and how they come into shared memory.
#pragma once
#include "tensor_core.cuh"

// Copy the weights of one step of ROWS rows: values first, metadata behind them. Rows behind the last tile repeat it:
// they are never stored, and zeros would be invalid metadata.
template <int ROWS, int THREADS>
__device__ __forceinline__ void copy_weights(
    unsigned shared, const uint4* values, const uint4* words, int row, int rows, int step, int steps
) {
    constexpr int VALUES = ROWS * 64, WORDS = ROWS * 8;  // bytes
    static_assert(WORDS / 16 <= THREADS, "each thread copies one piece of metadata at most");
    const int last = (rows + 15) / 16 - 1;
#pragma unroll
    for (int i = 0; i < VALUES / 16 / THREADS; ++i) {
        const int piece = threadIdx.x + i * THREADS;
        const int tile = min(row / 16 + piece / 64, last);
        copy_async(shared + piece * 16, values + ((long long)tile * steps + step) * 64 + piece % 64, true);
    }
    if (threadIdx.x < WORDS / 16) {
        const int tile = min(row / 16 + (int)threadIdx.x / 8, last);
        copy_async(
            shared + VALUES + threadIdx.x * 16, words + ((long long)tile * steps + step) * 8 + threadIdx.x % 8, true
        );
    }
}
