// Where activations come from: each source fills a panel [row][token] for some rows of K and some tokens.
#pragma once

#include <vector>

#include "layout.h"

namespace sparsedm {

// Tokens of a linear layer: x[token][k], rows `stride` floats apart.
struct TokenRows {
  const float* x;
  int64_t stride;

  struct Cursor {
    const TokenRows& source;
    int64_t token0, token1;

    // Rows are read kWidth tokens x kWidth features at a time and transposed in registers.
    void fill(float* panel, int64_t panel_stride, int64_t k0, int64_t k1) const {
      const int64_t rows = k1 - k0;
      for (int64_t t = token0; t < token1; t += kWidth) {
        const float* from[kWidth];
        for (int64_t i = 0; i < kWidth; ++i)  // past the last token, read it again
          from[i] = source.x + std::min(t + i, token1 - 1) * source.stride + k0;
        float* to = panel + (t - token0);
        if (rows < kWidth) {
          for (int64_t k = 0; k < rows; ++k)
            for (int64_t i = 0; i < kWidth; ++i) to[k * panel_stride + i] = from[i][k];
          continue;
        }
        for (int64_t k = 0; k < rows; k += kWidth) {
          const int64_t start = std::min(k, rows - kWidth);  // the last tile overlaps the one before
          Vec tile[kWidth];
          SPARSEDM_UNROLL
          for (int i = 0; i < kWidth; ++i) tile[i] = load(from[i] + start);
          transpose(tile);
          SPARSEDM_UNROLL
          for (int i = 0; i < kWidth; ++i) store(to + (start + i) * panel_stride, tile[i]);
        }
      }
    }
  };

  Cursor cursor(int64_t token0, int64_t token1) const { return {*this, token0, token1}; }
};

// The geometry of a convolution.
struct Window {
  int64_t images, channels, height, width;
  int64_t kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;

  int64_t out_height() const { return (height + 2 * padding_h - dilation_h * (kernel_h - 1) - 1) / stride_h + 1; }
  int64_t out_width() const { return (width + 2 * padding_w - dilation_w * (kernel_w - 1) - 1) / stride_w + 1; }
  int64_t pixels() const { return out_height() * out_width(); }
};

// One axis split by stride phase: position p of the padded axis is element p / stride of phase p % stride, so that a tap
// reads neighbours for neighbouring outputs whatever the stride is. Only phases that some tap reads are kept.
struct Phases {
  int64_t stride, padding, length;  // of one phase
  std::vector<int64_t> kept;        // phases, in the order stored
  std::vector<int64_t> slot, shift; // per tap: index into `kept`, first element

  Phases(int64_t kernel, int64_t stride_, int64_t padding_, int64_t dilation, int64_t out)
      : stride(stride_), padding(padding_), length(out + dilation * (kernel - 1) / stride_) {
    std::vector<int64_t> slot_of(stride, -1);
    for (int64_t tap = 0; tap < kernel; ++tap) {
      const int64_t phase = tap * dilation % stride;
      if (slot_of[phase] < 0) {
        slot_of[phase] = static_cast<int64_t>(kept.size());
        kept.push_back(phase);
      }
      slot.push_back(slot_of[phase]);
      shift.push_back(tap * dilation / stride);
    }
  }

  int64_t count() const { return static_cast<int64_t>(kept.size()); }
  // The element of the unpadded axis; may lie outside of it, in the padding.
  int64_t position(int64_t slot_, int64_t i) const { return i * stride + kept[slot_] - padding; }
};

// Planes of a padded, phase-split image [image][channel][phase y][phase x][y][x], read through a window (im2col).
struct Planes {
  const float* data;
  const float* end;
  Window window;
  Phases y, x;

  Planes(const Window& w)
      : data(nullptr),
        end(nullptr),
        window(w),
        y(w.kernel_h, w.stride_h, w.padding_h, w.dilation_h, w.out_height()),
        x(w.kernel_w, w.stride_w, w.padding_w, w.dilation_w, w.out_width()) {}

  int64_t phase_size() const { return y.length * x.length; }
  int64_t plane_size() const { return y.count() * x.count() * phase_size(); }
  int64_t size() const { return window.images * window.channels * plane_size(); }

  struct Run {
    int64_t from, to, size;  // consecutive tokens that lie side by side in a plane
  };

  struct Cursor {
    const Planes& source;
    std::vector<Run> runs;

    void fill(float* panel, int64_t panel_stride, int64_t k0, int64_t k1) const {
      const Window& w = source.window;
      for (int64_t k = k0; k < k1; ++k, panel += panel_stride) {
        const int64_t tap = k / w.channels, c = k % w.channels, ky = tap / w.kernel_w, kx = tap % w.kernel_w;
        const int64_t phase = source.y.slot[ky] * source.x.count() + source.x.slot[kx];
        const float* plane = source.data + c * source.plane_size() + phase * source.phase_size() +
                             source.y.shift[ky] * source.x.length + source.x.shift[kx];
        for (const Run& run : runs) {
          const float* from = plane + run.from;
          float* to = panel + run.to;
          // Whole registers: what is written too much is written again by the next run or the next row, or is never used.
          if (from + run.size + kWidth <= source.end) {
            for (int64_t i = 0; i < run.size; i += kWidth) store(to + i, load(from + i));
          } else {
            std::memcpy(to, from, run.size * sizeof(float));
          }
        }
      }
    }
  };

  Cursor cursor(int64_t token0, int64_t token1) const {
    Cursor cursor{*this, {}};
    const int64_t out_width = window.out_width(), pixels = window.pixels();
    for (int64_t t = token0; t < token1;) {
      const int64_t image = t / pixels, pixel = t % pixels, row = pixel / out_width, column = pixel % out_width;
      const int64_t size = std::min(out_width - column, token1 - t);
      const int64_t from = image * window.channels * plane_size() + row * x.length + column;
      if (!cursor.runs.empty() && cursor.runs.back().from + cursor.runs.back().size == from) {
        cursor.runs.back().size += size;
      } else {
        cursor.runs.push_back({from, t - token0, size});
      }
      t += size;
    }
    return cursor;
  }

  // Whether the image itself, NCHW, already is what this reads.
  bool is_identity() const {
    return window.stride_h == 1 && window.stride_w == 1 && window.padding_h == 0 && window.padding_w == 0;
  }
};

// Copies image rows into the planes. `channel_stride` and `pixel_stride` tell NCHW from channels_last.
inline void split(const Planes& planes, const float* image, bool channels_last, float* out) {
  const Window& w = planes.window;
  at::parallel_for(0, w.images * planes.y.count() * planes.y.length, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t i = task % planes.y.length, slot_y = task / planes.y.length % planes.y.count();
      const int64_t b = task / (planes.y.length * planes.y.count());
      const int64_t row = planes.y.position(slot_y, i);
      const bool inside_y = row >= 0 && row < w.height;
      for (int64_t slot_x = 0; slot_x < planes.x.count(); ++slot_x) {
        const int64_t stride = planes.x.stride, base = planes.x.position(slot_x, 0);
        // Elements [j0, j1) of this row lie inside the image.
        int64_t j0 = base < 0 ? (-base + stride - 1) / stride : 0;
        int64_t j1 = w.width > base ? (w.width - base + stride - 1) / stride : 0;
        j1 = inside_y ? std::min(j1, planes.x.length) : 0;
        j0 = std::min(j0, j1);
        float* to = out + b * w.channels * planes.plane_size() +
                    (slot_y * planes.x.count() + slot_x) * planes.phase_size() + i * planes.x.length;
        const auto zero_ends = [&](float* line) {
          std::fill(line, line + j0, 0.0f);
          std::fill(line + j1, line + planes.x.length, 0.0f);
        };
        if (!channels_last) {
          for (int64_t c = 0; c < w.channels; ++c, to += planes.plane_size()) {
            zero_ends(to);
            const float* from = image + ((b * w.channels + c) * w.height + row) * w.width + base;
            if (stride == 1) {
              if (j1 > j0) std::memcpy(to + j0, from + j0, (j1 - j0) * sizeof(float));
            } else {
              for (int64_t j = j0; j < j1; ++j) to[j] = from[j * stride];
            }
          }
          continue;
        }
        const float* from = image + ((b * w.height + row) * w.width + base) * w.channels;
        for (int64_t c = 0; c < w.channels; ++c) zero_ends(to + c * planes.plane_size());
        int64_t j = j0;
        for (; j + kWidth <= j1 && w.channels >= kWidth; j += kWidth) {
          for (int64_t c = 0; c < w.channels; c += kWidth) {
            const int64_t c0 = std::min(c, w.channels - kWidth);
            Vec tile[kWidth];
            for (int q = 0; q < kWidth; ++q) tile[q] = load(from + (j + q) * stride * w.channels + c0);
            transpose(tile);
            for (int q = 0; q < kWidth; ++q) store(to + (c0 + q) * planes.plane_size() + j, tile[q]);
          }
        }
        for (; j < j1; ++j)
          for (int64_t c = 0; c < w.channels; ++c) to[c * planes.plane_size() + j] = from[j * stride * w.channels + c];
      }
    }
  });
}

}  // namespace sparsedm
