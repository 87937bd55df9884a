// What follows the product: activation(product + bias) + residual, in fp32, rounded once on the way out.
#pragma once
#include "tensor_core.cuh"

// Numbered as in launch.py.
enum Activation { NONE, GELU, GELU_TANH, SILU };

struct Epilogue {
    const uint4* bias;      // (rows,) or null
    const uint4* residual;  // (tokens, rows) or null
    uint4* out;             // (tokens, rows)
    int rows;
    int tokens;
    int activation;
};

__device__ __forceinline__ void widen(uint4 eight, float (&v)[8]) {
    widen(eight.x, v[0], v[1]);
    widen(eight.y, v[2], v[3]);
    widen(eight.z, v[4], v[5]);
    widen(eight.w, v[6], v[7]);
}

__device__ __forceinline__ float activate(float x, int activation) {
    // exp overflows to infinity for a very negative x, and x / infinity is the right limit.
    switch (activation) {
        case GELU: return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
        case GELU_TANH: return x / (1.0f + __expf(-1.5957691216057308f * (x + 0.044715f * x * x * x)));
        case SILU: return x / (1.0f + __expf(-x));
        default: return x;
    }
}

// Eight neighbouring output features of one token.
__device__ __forceinline__ void finish(float (&v)[8], const Epilogue& e, int token, int row) {
    if (token >= e.tokens || row >= e.rows) return;
    float other[8];
    if (e.bias) {
        widen(e.bias[row / 8], other);
#pragma unroll
        for (int i = 0; i < 8; ++i) v[i] += other[i];
    }
    if (e.activation != NONE) {
#pragma unroll
        for (int i = 0; i < 8; ++i) v[i] = activate(v[i], e.activation);
    }
    const long long at = ((long long)token * e.rows + row) / 8;
    if (e.residual) {
        widen(e.residual[at], other);
#pragma unroll
        for (int i = 0; i < 8; ++i) v[i] += other[i];
    }
    e.out[at] = make_uint4(narrow(v[0], v[1]), narrow(v[2], v[3]), narrow(v[4], v[5]), narrow(v[6], v[7]));
}

// Floats of shared memory that `store_columns` needs.
template <int ROWS, int COLUMNS>
constexpr int STAGING = COLUMNS * 8 * (ROWS + 4);

// Turn the accumulators of a group of threads, ROWS x 8 * COLUMNS tokens, and finish them.
//
// The instructions leave a lane with features eight apart; memory wants eight neighbours. The way is through
// shared memory, a row of ROWS + 4 floats a token: lanes g + 4 t then write to 32 different banks. The loop over what
// was turned stays a loop: unrolled, the activations would be nine tenths of the machine code.
//
// `c` holds the TILES tiles of 16 rows of this warp, which start at `warp_row` of the group's; `sync` is a barrier of
// the GROUP threads, whose numbers start at a multiple of GROUP.
template <int ROWS, int COLUMNS, int GROUP, int TILES, class Sync>
__device__ __forceinline__ void store_columns(
    const float (*c)[TILES][4], int warp_row, float* staging, const Epilogue& e, int token, int row, Sync sync
) {
    constexpr int PITCH = ROWS + 4;
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    sync();
#pragma unroll
    for (int j = 0; j < COLUMNS; ++j)
#pragma unroll
        for (int i = 0; i < TILES; ++i)
#pragma unroll
            for (int k = 0; k < 4; ++k)
                staging[(j * 8 + 2 * t + k % 2) * PITCH + warp_row + i * 16 + g + k / 2 * 8] = c[j][i][k];
    sync();
#pragma unroll 2
    for (int chunk = threadIdx.x % GROUP; chunk < COLUMNS * ROWS; chunk += GROUP) {
        const int column = chunk / (ROWS / 8), first = chunk % (ROWS / 8) * 8;
        const float4 low = *(const float4*)(staging + column * PITCH + first);
        const float4 high = *(const float4*)(staging + column * PITCH + first + 4);
        float v[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
        finish(v, e, token + column, row + first);
    }
}
