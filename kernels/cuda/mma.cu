// out^T = W @ x^T with W 2:4 sparse, for GPUs with mma.sp (compute capability 8.0 and later).
//
// A block computes TILE_M output features x TILE_N tokens, a warp WARP_M x WARP_N of them, 64 columns a step, STAGES
// steps in flight through cp.async. Weights arrive in register order (fragments.py), so a lane's share of an
// instruction is one 128-bit load that meets no bank conflict; activations are swizzled for ldmatrix.
//
// Compile-time: BFLOAT16, TILE_M, TILE_N, WARP_M, WARP_N, STAGES, BLOCKS (resident on a multiprocessor),
// CONVOLUTION and, if it is one, WINDOW_H/W, STRIDE_H/W, PADDING_H/W, DILATION_H/W.
#include "epilogue.cuh"
#include "patches.cuh"
#include "weights.cuh"

constexpr int WARPS_M = TILE_M / WARP_M, WARPS_N = TILE_N / WARP_N, THREADS = WARPS_M * WARPS_N * 32;
constexpr int VALUES = TILE_M * 64, WORDS = TILE_M * 8, ACTIVATIONS = TILE_N * 128;  // bytes of a stage
constexpr int STAGE = VALUES + WORDS + ACTIVATIONS;
constexpr int TILES = WARP_M / 16, COLUMNS = WARP_N / 8;
static_assert(COLUMNS % 4 == 0, "the epilogue takes four columns at a time");

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) sparse_gemm(
    const uint4* values,  // (rows / 16, 2 * steps, 32 lanes) x 16 bytes
    const uint4* words,   // (rows / 16, steps, 32 lanes) x 4 bytes
    const void* x,        // (tokens, width), or NHWC
    const uint4* bias, const uint4* residual, uint4* out,  // see Epilogue
    int rows, int tokens, int activation,
    int width, int steps,
    int height, int image_width, int channels, int out_height, int out_width  // see Image; unused for a matrix
) {
    const Epilogue epilogue = {bias, residual, out, rows, tokens, activation};
    const Image image = {height, image_width, channels, out_height, out_width};
    extern __shared__ __align__(128) char memory[];
    const unsigned shared = (unsigned)__cvta_generic_to_shared(memory);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int warp_m = warp % WARPS_M, warp_n = warp / WARPS_M;
    const int row = blockIdx.x * TILE_M, token = blockIdx.y * TILE_N;

    Activations<TILE_N, THREADS> activations(x, token, epilogue.tokens, width, image);
    auto copy_stage = [&](int step) {
        if (step < steps) {
            const unsigned stage = shared + step % STAGES * STAGE;
            copy_weights<TILE_M, THREADS>(stage, values, words, row, epilogue.rows, step, steps);
            activations.copy(stage + VALUES + WORDS);
        }
        commit_copies();  // empty groups at the end keep the count
    };

    float c[COLUMNS][TILES][4] = {};
    for (int step = 0; step < STAGES - 1; ++step) copy_stage(step);

    for (int step = 0; step < steps; ++step) {
        wait_copies<STAGES - 2>();
        __syncthreads();  // this step has arrived for all, and all have left the one that is overwritten next
        copy_stage(step + STAGES - 1);
        const unsigned stage = shared + step % STAGES * STAGE;
        unsigned e[TILES];
#pragma unroll
        for (int i = 0; i < TILES; ++i) e[i] = load_shared(stage + VALUES + (warp_m * TILES + i) * 128 + lane * 4);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            unsigned a[TILES][4];
#pragma unroll
            for (int i = 0; i < TILES; ++i)
                load_shared(a[i], stage + ((warp_m * TILES + i) * 2 + half) * 512 + lane * 16);
#pragma unroll
            for (int j = 0; j < COLUMNS; ++j) {
                unsigned b[4];
                const int r = warp_n * WARP_N + j * 8 + lane % 8, column = half * 4 + lane / 8;
                load_matrices(b, stage + VALUES + WORDS + r * 128 + ((column ^ (r % 8)) << 4));
#pragma unroll
                for (int i = 0; i < TILES; ++i) {
                    if (half == 0)
                        multiply_sparse<0>(c[j][i], a[i], b, e[i]);
                    else
                        multiply_sparse<1>(c[j][i], a[i], b, e[i]);
                }
            }
        }
    }

    wait_copies<0>();
    __syncthreads();  // the stages are free: their memory turns the accumulators
    constexpr int GROUP = 4;  // columns turned at a time; all of them would need more memory than three stages have
    float* staging = (float*)memory + warp * STAGING<WARP_M, GROUP>;
#pragma unroll
    for (int j = 0; j < COLUMNS; j += GROUP)
        store_columns<WARP_M, GROUP, 32>(
            c + j, 0, staging, epilogue, token + warp_n * WARP_N + j * 8, row + warp_m * WARP_M, [] { __syncwarp(); }
        );
}
