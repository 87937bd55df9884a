// out^T = W @ x^T with W 2:4 sparse, for Hopper (sm_90a): wgmma.sp, the only instruction that reaches its full rate.
//
// A block computes 128 output features x TILE_N tokens with two warpgroups of 64 features each, 64 columns a step.
// Tensor cores take weights from registers, in the order in which they were packed, and activations from shared memory,
// swizzled. The copy engine brings both: each warp asks for its own weights, the first one for the activations. Only the
// patches of an image are gathered by all threads, with cp.async: its channels need not fill a step, and the engine's own
// im2col copies one tap at a time. Products of one step run while the next one is issued: STAGES - 2 steps are on their
// way, one is being multiplied, one was. No warp is set aside to copy: the block meets once a step, while the products of
// the step before still run.
//
// Compile-time: BFLOAT16, TILE_M, TILE_N, WARP_M, WARP_N (of a warpgroup), STAGES, BLOCKS (resident on a multiprocessor),
// CONVOLUTION and, if it is one, WINDOW_H/W, STRIDE_H/W, PADDING_H/W, DILATION_H/W.
#include "epilogue.cuh"
#include "patches.cuh"
#include "warpgroup.cuh"

constexpr int THREADS = 256;
static_assert(TILE_M == 128 && WARP_M == 64, "two warpgroups of one instruction's rows");
static_assert(WARP_N == TILE_N && TILE_N % 128 == 0, "each multiplies all tokens, 128 an instruction");
constexpr int VALUES = TILE_M * 64, WORDS = TILE_M * 8, ACTIVATIONS = TILE_N * 128;  // bytes of a stage
constexpr int STAGE = ACTIVATIONS + VALUES + WORDS;
constexpr int PARTS = TILE_N / 128;  // instructions side by side
constexpr int BULK = VALUES + WORDS + (CONVOLUTION ? 0 : ACTIVATIONS);  // bytes of a stage from the copy engine
static_assert(STAGE % 1024 == 0, "the swizzle repeats every 1024 bytes");
static_assert(STAGES >= 4, "two steps are in the tensor cores' hands");

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) sparse_gemm(
    const uint4* values,  // (rows / 16, 2 * steps, 32 lanes) x 16 bytes
    const uint4* words,   // (rows / 16, steps, 32 lanes) x 4 bytes
#if CONVOLUTION
    const void* x,  // NHWC
#else
    const __grid_constant__ TensorMap x,  // (tokens, width) in boxes of TILE_N x 64
#endif
    const uint4* bias, const uint4* residual, uint4* out,  // see Epilogue
    int rows, int tokens, int activation,
    int width, int steps,
    int height, int image_width, int channels, int out_height, int out_width  // see Image; unused for a matrix
) {
    const Epilogue epilogue = {bias, residual, out, rows, tokens, activation};
    const Image image = {height, image_width, channels, out_height, out_width};
    extern __shared__ __align__(1024) char memory[];
    const unsigned shared = (unsigned)__cvta_generic_to_shared(memory);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = warp / 4;
    const int row = blockIdx.x * TILE_M, token = blockIdx.y * TILE_N;

    const unsigned barriers = shared + STAGES * STAGE;
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; ++i) create_barrier(barriers + i * 8);
        show_to_engines();
    }
    __syncthreads();

#if CONVOLUTION
    Activations<TILE_N, THREADS> activations(x, token, tokens, width, image);
#endif
    // Of the 16 rows that this warp multiplies. Those behind the last repeat it: zeros would be invalid metadata.
    const long long tile = min(row / 16 + warp, (rows + 15) / 16 - 1);
    const uint4 *my_values = values + tile * steps * 64, *my_words = words + tile * steps * 8;
    auto copy_stage = [&](int step) {
        if (step < steps) {
            const unsigned stage = shared + step % STAGES * STAGE, barrier = barriers + step % STAGES * 8;
            if (lane == 0) {
                if (warp == 0) {
                    announce_bytes(barrier, BULK);
#if !CONVOLUTION
                    copy_box(stage, x, step * 64, token, barrier);
#endif
                }
                copy_bulk(stage + ACTIVATIONS + warp * 1024, my_values + step * 64, 1024, barrier);
                copy_bulk(stage + ACTIVATIONS + VALUES + warp * 128, my_words + step * 8, 128, barrier);
            }
            __syncwarp();
#if CONVOLUTION
            activations.copy(stage);
#endif
        }
#if CONVOLUTION
        commit_copies();  // empty groups at the end keep the count
#endif
    };

    float c[PARTS][16][1][4] = {};
    // `a` must stay as it is until the products of the next step were issued: steps take turns with two of them.
    auto multiply_stage = [&](int step, unsigned (&a)[2][4]) {
#if CONVOLUTION
        wait_copies<STAGES - 3>();
        show_to_engines();
#endif
        wait_bytes(barriers + step % STAGES * 8, step / STAGES % 2);
        __syncthreads();  // this step has arrived for all, and the products of the last but one are done
        const unsigned stage = shared + step % STAGES * STAGE;
        const unsigned e = load_shared(stage + ACTIVATIONS + VALUES + warp * 128 + lane * 4);
#pragma unroll
        for (int half = 0; half < 2; ++half)
            load_shared(a[half], stage + ACTIVATIONS + (warp * 2 + half) * 512 + lane * 16);
        begin_products();
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
            const unsigned long long b = describe(stage + part * 128 * 128);
            multiply_sparse_group<0>(c[part], a[0], b, e);
            multiply_sparse_group<1>(c[part], a[1], b + 64 / 16, e);  // the next 32 columns
        }
        commit_products();
        copy_stage(step + STAGES - 2);
        wait_products<1>();
    };

    for (int step = 0; step < STAGES - 2; ++step) copy_stage(step);
    unsigned even[2][4], odd[2][4];
    for (int step = 0; step < steps; step += 2) {
        multiply_stage(step, even);
        if (step + 1 < steps) multiply_stage(step + 1, odd);
    }

    wait_products<0>();
    __syncthreads();  // the stages are free: their memory turns the accumulators
    constexpr int COLUMNS = 4;
    float* staging = (float*)memory + group * STAGING<64, COLUMNS>;
#pragma unroll
    for (int part = 0; part < PARTS; ++part)
#pragma unroll
        for (int j = 0; j < 16; j += COLUMNS)
            store_columns<64, COLUMNS, 128>(
                c[part] + j, warp % 4 * 16, staging, epilogue, token + part * 128 + j * 8, row + group * 64,
                [] { sync_warpgroup(); }
            );
}
