// Where the activations of one k step lie: rows of a matrix, or patches of an NHWC image that is never unfolded.
#pragma once

// Sizes of the image; window, stride, padding and dilation are compile-time constants, so that divisions by them fold.
struct Image {
    int height, width, channels, out_height, out_width;
};

// One thread's share of a tile of TOKENS x 64 activations: one 16-byte column, every THREADS / 8-th token.
//
// `seek` must be called for consecutive k steps, first 0, 1, 2, ...
template <int TOKENS, int THREADS>
struct Activations {
    static constexpr int STRIDE = THREADS / 8, COUNT = TOKENS / STRIDE;
    const char* x;
    int first, tokens, k, width;
#if CONVOLUTION
    Image image;
    int pixel[COUNT];   // index of the input pixel under the window's first tap; may lie outside the image
    short y[COUNT], x0[COUNT];
    int channel, tap;
#endif

    __device__ __forceinline__ Activations(const void* x, int token, int tokens, int width, Image im)
        : x((const char*)x), first(token + threadIdx.x / 8), tokens(tokens), k(threadIdx.x % 8 * 8), width(width) {
#if CONVOLUTION
        image = im;
        channel = k % im.channels;
        tap = k / im.channels;
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            const int token = first + i * STRIDE;
            const int column = token % im.out_width, row = token / im.out_width % im.out_height;
            const int batch = token / im.out_width / im.out_height;
            // A token behind the last one starts so far above the image that no tap reaches it.
            y[i] = token < tokens ? row * STRIDE_H - PADDING_H : -16384;
            x0[i] = column * STRIDE_W - PADDING_W;
            pixel[i] = (batch * im.height + y[i]) * im.width + x0[i];
        }
#endif
    }

    // Copy this thread's share of the next k step into `shared`, swizzled: column c of token r goes to c ^ (r % 8).
    __device__ __forceinline__ void copy(unsigned shared) {
        const int token = threadIdx.x / 8, column = threadIdx.x % 8;
#if CONVOLUTION
        const int dy = tap / WINDOW_W * DILATION_H, dx = tap % WINDOW_W * DILATION_W;
        const int shift = dy * image.width + dx;
        const bool inside = tap < WINDOW_H * WINDOW_W;
#endif
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            const int r = token + i * STRIDE;
#if CONVOLUTION
            const bool valid = inside && (unsigned)(y[i] + dy) < (unsigned)image.height &&
                               (unsigned)(x0[i] + dx) < (unsigned)image.width;
            const char* from = x + ((long long)(pixel[i] + shift) * image.channels + channel) * 2;
#else
            const bool valid = first + i * STRIDE < tokens && k < width;
            const char* from = x + ((long long)(first + i * STRIDE) * width + k) * 2;
#endif
            copy_async(shared + r * 128 + ((column ^ (r % 8)) << 4), valid ? from : x, valid);
        }
        k += 64;
#if CONVOLUTION
        channel += 64;
        while (channel >= image.channels) {
            channel -= image.channels;
            ++tap;
        }
#endif
    }
};
