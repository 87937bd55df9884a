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
          // Sixteen short streams at once are more than the hardware follows: 5 % of a layer at K = 512.
          for (int i = 0; i < kWidth; ++i) __builtin_prefetch(from[i] + start + 4 * kWidth);
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

// How many rows ahead the next planes are asked for: a tenth of the time of a 1x1 convolution at 1:4v4.
constexpr int64_t kPlanesAhead = 12;

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

  struct Piece {
    int64_t from, to;  // a register of consecutive tokens that lie side by side in a plane
  };

  // A piece may copy more than its tokens: what it stores too much is stored again by the next piece or the next row, or
  // is never used; what it loads too much must lie before `end`, so the last few rows of the data go through `careful`.
  struct Cursor {
    const Planes& source;
    std::vector<Piece> pieces;
    int64_t last = 0;  // the largest Piece::from
    int64_t tokens = 0;

    void fill(float* panel, int64_t panel_stride, int64_t k0, int64_t k1) const {
      const Window& w = source.window;
      for (int64_t k = k0; k < k1;) {
        const int64_t tap = k / w.channels, ky = tap / w.kernel_w, kx = tap % w.kernel_w;
        const int64_t phase = source.y.slot[ky] * source.x.count() + source.x.slot[kx];
        const float* plane = source.data + k % w.channels * source.plane_size() + phase * source.phase_size() +
                             source.y.shift[ky] * source.x.length + source.x.shift[kx];
        for (const int64_t stop = std::min(k1, (tap + 1) * w.channels); k < stop; ++k) {
          if (plane + last + kWidth <= source.end) {
            for (const Piece& piece : pieces) {
              __builtin_prefetch(plane + piece.from + kPlanesAhead * source.plane_size());
              store(panel + piece.to, load(plane + piece.from));
            }
          } else {
            careful(panel, plane);
          }
          plane += source.plane_size();
          panel += panel_stride;
        }
      }
    }

   private:
    void careful(float* panel, const float* plane) const {
      for (size_t i = 0; i < pieces.size(); ++i) {
        const int64_t next = i + 1 < pieces.size() ? pieces[i + 1].to : tokens;
        for (int64_t j = 0; j < next - pieces[i].to; ++j) panel[pieces[i].to + j] = plane[pieces[i].from + j];
      }
    }
  };

  Cursor cursor(int64_t token0, int64_t token1) const {
    Cursor cursor{*this, {}, 0, token1 - token0};
    const int64_t out_width = window.out_width(), pixels = window.pixels();
    for (int64_t t = token0, left = 0; t < token1;) {
      const int64_t image = t / pixels, pixel = t % pixels, row = pixel / out_width, column = pixel % out_width;
      // Where no padding lies between rows, the rest of the image is one run.
      left = x.length == out_width && y.length == window.out_height() ? pixels - pixel : out_width - column;
      left = std::min(left, token1 - t);
      const int64_t from = image * window.channels * plane_size() + row * x.length + column;
      for (int64_t i = 0; i < left; i += kWidth) {
        cursor.pieces.push_back({from + i, t - token0 + i});
        cursor.last = std::max(cursor.last, from + i);
      }
      t += left;
    }
    return cursor;
  }

  // Whether the image itself, NCHW, already is what this reads.
  bool is_identity() const {
    return window.stride_h == 1 && window.stride_w == 1 && window.padding_h == 0 && window.padding_w == 0;
  }
};

namespace detail {

// The elements [first, last) of one row of a phase lie inside the image; the rest is padding.
struct Inside {
  int64_t first, last;

  Inside(const Phases& axis, int64_t slot, int64_t size) {
    const int64_t base = axis.position(slot, 0);
    last = size > base ? std::min((size - base + axis.stride - 1) / axis.stride, axis.length) : 0;
    first = std::min(base < 0 ? (-base + axis.stride - 1) / axis.stride : 0, last);
  }
};

inline void copy_strided(float* to, const float* from, int64_t size, int64_t stride) {
  if (stride == 1) {
    std::memcpy(to, from, size * sizeof(float));
    return;
  }
  int64_t i = 0;
  if (stride == 2) {
    // The last pair of loads ends one element after the last one needed, so it is left to the scalar loop.
    for (; i + kWidth < size; i += kWidth) store(to + i, evens(load(from + 2 * i), load(from + 2 * i + kWidth)));
  }
  for (; i < size; ++i) to[i] = from[i * stride];
}

}  // namespace detail

// Copies an NCHW image into the planes, one plane after the other.
inline void split_channel_major(const Planes& planes, const float* image, float* out) {
  const Window& w = planes.window;
  at::parallel_for(0, w.images * w.channels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t plane = begin; plane < end; ++plane) {
      float* to = out + plane * planes.plane_size();
      for (int64_t slot_y = 0; slot_y < planes.y.count(); ++slot_y) {
        for (int64_t slot_x = 0; slot_x < planes.x.count(); ++slot_x) {
          const detail::Inside inside(planes.x, slot_x, w.width);
          for (int64_t i = 0; i < planes.y.length; ++i, to += planes.x.length) {
            const int64_t row = planes.y.position(slot_y, i);
            const int64_t last = row >= 0 && row < w.height ? inside.last : 0, first = std::min(inside.first, last);
            const float* from = image + (plane * w.height + row) * w.width + planes.x.position(slot_x, first);
            std::fill(to, to + first, 0.0f);
            if (first < last) detail::copy_strided(to + first, from, last - first, planes.x.stride);
            std::fill(to + last, to + planes.x.length, 0.0f);
          }
        }
      }
    }
  });
}

// Copies a channels_last image into the planes, row by row, transposing pixels x channels in registers.
inline void split_channels_last(const Planes& planes, const float* image, float* out) {
  const Window& w = planes.window;
  const int64_t size = planes.plane_size();
  at::parallel_for(0, w.images * planes.y.count() * planes.y.length, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t i = task % planes.y.length, slot_y = task / planes.y.length % planes.y.count();
      const int64_t b = task / (planes.y.length * planes.y.count()), row = planes.y.position(slot_y, i);
      for (int64_t slot_x = 0; slot_x < planes.x.count(); ++slot_x) {
        const detail::Inside inside(planes.x, slot_x, w.width);
        const int64_t last = row >= 0 && row < w.height ? inside.last : 0, first = std::min(inside.first, last);
        float* to = out + b * w.channels * size + (slot_y * planes.x.count() + slot_x) * planes.phase_size() +
                    i * planes.x.length;
        for (int64_t c = 0; c < w.channels; ++c) {
          std::fill(to + c * size, to + c * size + first, 0.0f);
          std::fill(to + c * size + last, to + c * size + planes.x.length, 0.0f);
        }
        const int64_t step = planes.x.stride * w.channels;
        const float* from =
            image + ((b * w.height + row) * w.width + planes.x.position(slot_x, first)) * w.channels;
        int64_t j = first;
        for (; j + kWidth <= last && w.channels >= kWidth; j += kWidth, from += kWidth * step) {
          for (int64_t c = 0; c < w.channels; c += kWidth) {
            const int64_t c0 = std::min(c, w.channels - kWidth);
            Vec tile[kWidth];
            SPARSEDM_UNROLL
            for (int q = 0; q < kWidth; ++q) tile[q] = load(from + q * step + c0);
            transpose(tile);
            SPARSEDM_UNROLL
            for (int q = 0; q < kWidth; ++q) store(to + (c0 + q) * size + j, tile[q]);
          }
        }
        for (; j < last; ++j, from += step)
          for (int64_t c = 0; c < w.channels; ++c) to[c * size + j] = from[c];
      }
    }
  });
}

}  // namespace sparsedm
