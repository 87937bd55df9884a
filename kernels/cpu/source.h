// Where activations come from: each source fills a panel [row][token] for some rows of K and some tokens.
#pragma once

#include <vector>

#include "layout.h"

namespace sparsedm {

// Tokens of a linear layer: x[token][k], rows `stride` elements apart.
template <class T>
struct TokenRows {
  const T* x;
  int64_t stride;

  struct Cursor {
    const TokenRows& source;
    int64_t token0, token1;

    // Rows are read kWidth tokens x kWidth features at a time and transposed in registers.
    template <class Panel>
    void fill(Panel* panel, int64_t panel_stride, int64_t k0, int64_t k1) const {
      const int64_t rows = k1 - k0;
      for (int64_t t = token0; t < token1; t += kWidth) {
        const T* from[kWidth];
        for (int64_t i = 0; i < kWidth; ++i)  // past the last token, read it again
          from[i] = source.x + std::min(t + i, token1 - 1) * source.stride + k0;
        Panel* to = panel + (t - token0);
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

// One axis of a convolution.
struct Axis {
  int64_t size, kernel, stride, padding, dilation;

  int64_t reach() const { return dilation * (kernel - 1) + 1; }
  int64_t out() const { return (size + 2 * padding - reach()) / stride + 1; }
};

// The geometry of a convolution; of two dimensions when the first axis is one plane deep.
struct Window {
  int64_t images, channels;
  Axis z, y, x;

  int64_t pixels() const { return z.out() * y.out() * x.out(); }
};

// One axis split by stride phase: position p of the padded axis is element p / stride of phase p % stride, so that a tap
// reads neighbours for neighbouring outputs whatever the stride is. Only phases that some tap reads are kept.
struct Phases {
  int64_t stride, padding, length;  // of one phase
  std::vector<int64_t> kept;        // phases, in the order stored
  std::vector<int64_t> slot, shift; // per tap: index into `kept`, first element

  explicit Phases(const Axis& axis)
      : stride(axis.stride), padding(axis.padding), length(axis.out() + (axis.reach() - 1) / axis.stride) {
    std::vector<int64_t> slot_of(stride, -1);
    for (int64_t tap = 0; tap < axis.kernel; ++tap) {
      const int64_t phase = tap * axis.dilation % stride;
      if (slot_of[phase] < 0) {
        slot_of[phase] = static_cast<int64_t>(kept.size());
        kept.push_back(phase);
      }
      slot.push_back(slot_of[phase]);
      shift.push_back(tap * axis.dilation / stride);
    }
  }

  int64_t count() const { return static_cast<int64_t>(kept.size()); }
  // The element of the unpadded axis; may lie outside of it, in the padding.
  int64_t position(int64_t slot_, int64_t i) const { return i * stride + kept[slot_] - padding; }
};

// How many rows ahead the next planes are asked for: a tenth of the time of a 1x1 convolution at 1:4v4.
constexpr int64_t kPlanesAhead = 12;

// Planes of a padded, phase-split image [image][channel][phase z][phase y][phase x][z][y][x], read through a window
// (im2col). A plane holds all that one channel of one image has, every depth of it.
template <class T>
struct Planes {
  const T* data;
  const T* end;
  Window window;
  Phases z, y, x;

  explicit Planes(const Window& w) : data(nullptr), end(nullptr), window(w), z(w.z), y(w.y), x(w.x) {}

  int64_t phase_size() const { return z.length * y.length * x.length; }
  int64_t plane_size() const { return z.count() * y.count() * x.count() * phase_size(); }
  int64_t size() const { return window.images * window.channels * plane_size(); }

  // Tokens that are copied at once.
  static constexpr int64_t kPiece = kBytes / sizeof(typename PanelOf<T>::type);

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

    template <class Panel>
    void fill(Panel* panel, int64_t panel_stride, int64_t k0, int64_t k1) const {
      const Window& w = source.window;
      for (int64_t k = k0; k < k1;) {
        const Phases &z = source.z, &y = source.y, &x = source.x;
        const int64_t tap = k / w.channels, kx = tap % w.x.kernel, ky = tap / w.x.kernel % w.y.kernel,
                      kz = tap / w.x.kernel / w.y.kernel;
        const int64_t phase = (z.slot[kz] * y.count() + y.slot[ky]) * x.count() + x.slot[kx];
        const int64_t shift = (z.shift[kz] * y.length + y.shift[ky]) * x.length + x.shift[kx];
        const T* plane = source.data + k % w.channels * source.plane_size() + phase * source.phase_size() + shift;
        for (const int64_t stop = std::min(k1, (tap + 1) * w.channels); k < stop; ++k) {
          if (plane + last + kPiece <= source.end) {
            for (const Piece& piece : pieces) {
              __builtin_prefetch(plane + piece.from + kPlanesAhead * source.plane_size());
              copy(panel + piece.to, plane + piece.from);
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
    template <class Panel>
    void careful(Panel* panel, const T* plane) const {
      for (size_t i = 0; i < pieces.size(); ++i) {
        const int64_t next = i + 1 < pieces.size() ? pieces[i + 1].to : tokens;
        for (int64_t j = 0; j < next - pieces[i].to; ++j) panel[pieces[i].to + j] = plane[pieces[i].from + j];
      }
    }
  };

  Cursor cursor(int64_t token0, int64_t token1) const {
    Cursor cursor{*this, {}, 0, token1 - token0};
    const int64_t width = window.x.out(), slice = width * window.y.out(), pixels = window.pixels();
    for (int64_t t = token0, left = 0; t < token1;) {
      const int64_t image = t / pixels, pixel = t % pixels, column = pixel % width;
      // Where no padding lies between rows, the rest of the slice is one run; where none lies between slices, of the image.
      left = x.length != width ? width - column : y.length != window.y.out() ? slice - pixel % slice : pixels - pixel;
      left = std::min(left, token1 - t);
      const int64_t row = pixel / slice * y.length + pixel % slice / width;
      const int64_t from = image * window.channels * plane_size() + row * x.length + column;
      for (int64_t i = 0; i < left; i += kPiece) {
        cursor.pieces.push_back({from + i, t - token0 + i});
        cursor.last = std::max(cursor.last, from + i);
      }
      t += left;
    }
    return cursor;
  }

  // Whether the image itself, channel-major, already is what this reads.
  bool is_identity() const {
    const auto plain = [](const Phases& axis) { return axis.stride == 1 && axis.padding == 0; };
    return plain(z) && plain(y) && plain(x);
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

template <class T>
inline void copy_strided(T* to, const T* from, int64_t size, int64_t stride) {
  if (stride == 1) {
    std::memcpy(to, from, size * sizeof(T));
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

// Copies a channel-major image (NCHW, NCDHW) into the planes, one plane after the other.
template <class T>
void split_channel_major(const Planes<T>& planes, const T* image, T* out) {
  const Window& w = planes.window;
  const Phases &z = planes.z, &y = planes.y, &x = planes.x;
  at::parallel_for(0, w.images * w.channels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t plane = begin; plane < end; ++plane) {
      T* to = out + plane * planes.plane_size();
      for (int64_t phase = 0; phase < z.count() * y.count() * x.count(); ++phase) {
        const int64_t slot_x = phase % x.count(), slot_y = phase / x.count() % y.count();
        const int64_t slot_z = phase / x.count() / y.count();
        const detail::Inside inside(x, slot_x, w.x.size);
        for (int64_t k = 0; k < z.length; ++k) {
          const int64_t depth = z.position(slot_z, k);
          for (int64_t i = 0; i < y.length; ++i, to += x.length) {
            const int64_t row = y.position(slot_y, i);
            const bool exists = depth >= 0 && depth < w.z.size && row >= 0 && row < w.y.size;
            const int64_t last = exists ? inside.last : 0, first = std::min(inside.first, last);
            const T* from =
                image + ((plane * w.z.size + depth) * w.y.size + row) * w.x.size + x.position(slot_x, first);
            std::fill(to, to + first, T(0));
            if (first < last) detail::copy_strided(to + first, from, last - first, x.stride);
            std::fill(to + last, to + x.length, T(0));
          }
        }
      }
    }
  });
}

// Copies a channels_last image (NHWC, NDHWC) into the planes, row by row, transposing pixels x channels in registers.
template <class T>
void split_channels_last(const Planes<T>& planes, const T* image, T* out) {
  const Window& w = planes.window;
  const Phases &z = planes.z, &y = planes.y, &x = planes.x;
  const int64_t size = planes.plane_size();
  const int64_t rows = z.count() * y.count() * z.length * y.length;  // of all phases along x at once
  at::parallel_for(0, w.images * rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / rows, i = task % (z.length * y.length), slot = task % rows / (z.length * y.length);
      const int64_t depth = z.position(slot / y.count(), i / y.length), row = y.position(slot % y.count(), i % y.length);
      const bool exists = depth >= 0 && depth < w.z.size && row >= 0 && row < w.y.size;
      for (int64_t slot_x = 0; slot_x < x.count(); ++slot_x) {
        const detail::Inside inside(x, slot_x, w.x.size);
        const int64_t last = exists ? inside.last : 0, first = std::min(inside.first, last);
        T* to = out + b * w.channels * size + (slot * x.count() + slot_x) * planes.phase_size() + i * x.length;
        for (int64_t c = 0; c < w.channels; ++c) {
          std::fill(to + c * size, to + c * size + first, T(0));
          std::fill(to + c * size + last, to + c * size + x.length, T(0));
        }
        const int64_t step = x.stride * w.channels;
        const int64_t pixel = ((b * w.z.size + depth) * w.y.size + row) * w.x.size + x.position(slot_x, first);
        const T* from = image + pixel * w.channels;
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
