// The way out of finished sums, where the residual is added.
#pragma once

#include "half.h"

namespace sparsedm {

// Finished sums of a run of tokens: data[channel - channel0][token - token0], rows `stride` floats apart.
struct Sums {
  const float* data;
  int64_t stride;
  int64_t channel0, channel1;
  int64_t token0, token1;
};

// Writes sums as (token, channel): a linear layer's output, or a channels_last image.
template <class T>
struct TokenMajor {
  T* out;
  const T* residual;  // null, or laid out as `out`
  int64_t channels;

  void operator()(const Sums& sums) const {
    const int64_t count = sums.channel1 - sums.channel0;
    for (int64_t t = sums.token0; t < sums.token1; t += kWidth) {
      const int64_t tokens = std::min<int64_t>(kWidth, sums.token1 - t);
      const float* from = sums.data + (t - sums.token0);
      const int64_t at = t * channels + sums.channel0;
      if (count < kWidth) {
        for (int64_t i = 0; i < tokens; ++i)
          for (int64_t c = 0; c < count; ++c)
            out[at + i * channels + c] =
                from[c * sums.stride + i] + (residual ? static_cast<float>(residual[at + i * channels + c]) : 0.0f);
        continue;
      }
      for (int64_t c = 0; c < count; c += kWidth) {
        const int64_t c0 = std::min(c, count - kWidth);  // the last tile overlaps the one before
        // Stores that miss the cache wait in a short queue: 16 % of a 1:4 layer's time without asking ahead.
        for (int64_t i = 0; i < tokens; ++i) __builtin_prefetch(out + at + i * channels + c0 + 4 * kWidth, 1);
        Vec tile[kWidth];
        SPARSEDM_UNROLL
        for (int i = 0; i < kWidth; ++i) tile[i] = load(from + (c0 + i) * sums.stride);
        transpose(tile);
        T* to = out + at + c0;
        const T* add = residual ? residual + at + c0 : nullptr;
        if (tokens == kWidth) {  // a fixed count, so that the tile stays in registers
          SPARSEDM_UNROLL
          for (int i = 0; i < kWidth; ++i) store(to + i * channels, add ? tile[i] + load(add + i * channels) : tile[i]);
        } else {
          for (int64_t i = 0; i < tokens; ++i)
            store(to + i * channels, add ? tile[i] + load(add + i * channels) : tile[i]);
        }
      }
    }
  }
};

// Writes sums as (image, channel, pixel): NCHW. A token is image * pixels + pixel.
template <class T>
struct ChannelMajor {
  T* out;
  const T* residual;  // null, or laid out as `out`
  int64_t channels, pixels;

  void operator()(const Sums& sums) const {
    for (int64_t t = sums.token0; t < sums.token1;) {
      const int64_t image = t / pixels, pixel = t % pixels;
      const int64_t size = std::min(pixels - pixel, sums.token1 - t);
      for (int64_t c = sums.channel0; c < sums.channel1; ++c) {
        const int64_t at = (image * channels + c) * pixels + pixel;
        const float* from = sums.data + (c - sums.channel0) * sums.stride + (t - sums.token0);
        int64_t i = 0;
        for (; i + kWidth <= size; i += kWidth) {
          Vec z = load(from + i);
          if (residual) z += load(residual + at + i);
          store(out + at + i, z);
        }
        for (; i < size; ++i) out[at + i] = from[i] + (residual ? static_cast<float>(residual[at + i]) : 0.0f);
      }
      t += size;
    }
  }
};

}  // namespace sparsedm
