// Where activations come from: each source fills a panel [row][token] for some rows of K and some tokens.
#pragma once

#include <array>
#include <vector>

#include "layout.h"

namespace sparsedm {

// Tokens as panels see them: columns of `rows` registers. A panel is a stretch of one column.
struct Grid {
  int64_t columns, rows;

  int64_t registers() const { return columns * rows; }
};

// Tokens side by side, both in the output and in the sums of a channel.
struct Run {
  int64_t at;  // in the sums
  int64_t token, count;
};

// Tokens of a linear layer: x[token][k], rows `stride` elements apart.
template <class T>
struct TokenRows {
  const T* x;
  int64_t stride, tokens;

  struct Cursor {
    const TokenRows& source;
    int64_t token0, token1;

    std::array<Run, 1> runs() const { return {{{0, token0, token1 - token0}}}; }

    // Rows are read kWidth tokens x kWidth features at a time and transposed in registers.
    template <class Panel>
    void fill(Panel* panel, const Layout& layout, int64_t block) const {
      const int64_t panel_stride = layout.row_bytes / static_cast<int64_t>(sizeof(Panel));
      const int64_t k0 = layout.first(block) * layout.m, rows = layout.first(block + 1) * layout.m - k0;
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

  Grid grid(const Layout&, int64_t width) const { return {1, (tokens + width - 1) / width}; }

  Cursor cursor(const Layout&, int64_t width, int64_t, int64_t first, int64_t last) const {
    return {*this, first * width, std::min(tokens, last * width)};
  }
};

// One axis of a convolution.
struct Axis {
  int64_t size, padding;
  KernelAxis kernel;

  int64_t out() const { return (size + 2 * padding - kernel.reach()) / kernel.stride + 1; }
};

// The geometry of a convolution; of two dimensions when the first axis is one plane deep.
struct Window {
  int64_t images, channels;
  Axis z, y, x;

  int64_t pixels() const { return z.out() * y.out() * x.out(); }
};

// The phases of a padded axis.
struct Split : Phases {
  int64_t stride, padding, length;  // of one phase

  explicit Split(const Axis& axis)
      : Phases(axis.kernel), stride(axis.kernel.stride), padding(axis.padding),
        length(axis.out() + (axis.kernel.reach() - 1) / axis.kernel.stride) {}

  // The element of the unpadded axis; may lie outside of it, in the padding.
  int64_t position(int64_t slot_, int64_t i) const { return i * stride + kept[slot_] - padding; }
};

// Planes of a padded, phase-split image [image][channel][phase z][phase y][phase x][z][y][x], read through a window. A
// plane holds all that one channel of one image has, every depth of it.
template <class T>
struct Planes {
  const T* data;
  const T* end;
  Window window;
  Split z, y, x;

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
    std::vector<Piece> pieces;     // of one row of the panel; of one channel where taps share rows
    std::vector<Run> tokens;
    int64_t ahead;                 // how many planes ahead memory is asked for,
    size_t asked;                  // by the first so many pieces

    const std::vector<Run>& runs() const { return tokens; }

    template <class Panel>
    void fill(Panel* panel, const Layout& layout, int64_t block) const {
      const int64_t step = layout.row_bytes / static_cast<int64_t>(sizeof(Panel));
      if (layout.shares_rows()) {
        const int64_t c0 = layout.first_channel(block), c1 = layout.first_channel(block + 1);
        copy_planes(panel, step, source.data + c0 * source.plane_size(), c1 - c0);
        return;
      }
      const Split &z = source.z, &y = source.y, &x = source.x;
      for (int64_t k = layout.first(block) * layout.m, k1 = layout.first(block + 1) * layout.m; k < k1;) {
        const int64_t channels = source.window.channels, tap = k / channels;
        const int64_t tap_x = tap % x.taps(), tap_y = tap / x.taps() % y.taps(), tap_z = tap / x.taps() / y.taps();
        const int64_t count = std::min(k1, (tap + 1) * channels) - k;
        const int64_t at = source.offset(z.slot[tap_z], y.slot[tap_y], x.slot[tap_x], z.shift[tap_z], y.shift[tap_y],
                                         x.shift[tap_x]);
        copy_planes(panel, step, source.data + k % channels * source.plane_size() + at, count);
        panel += count * step;
        k += count;
      }
    }

   private:
    template <class Panel>
    void copy_planes(Panel* panel, int64_t step, const T* plane, int64_t count) const {
      int64_t last = 0;
      for (const Piece& piece : pieces) last = std::max(last, piece.from);
      for (int64_t i = 0; i < count; ++i, plane += source.plane_size(), panel += step) {
        if (plane + last + kPiece > source.end) {
          careful(panel, plane, step);
          continue;
        }
        for (size_t p = 0; p < asked; ++p) __builtin_prefetch(plane + pieces[p].from + ahead * source.plane_size());
        for (const Piece& piece : pieces) copy(panel + piece.to, plane + piece.from);
      }
    }

    template <class Panel>
    void careful(Panel* panel, const T* plane, int64_t step) const {
      for (size_t i = 0; i < pieces.size(); ++i) {
        const int64_t next = i + 1 < pieces.size() ? pieces[i + 1].to : step;
        const int64_t count = std::min({kPiece, next - pieces[i].to, source.end - plane - pieces[i].from});
        for (int64_t j = 0; j < count; ++j) panel[pieces[i].to + j] = static_cast<Panel>(plane[pieces[i].from + j]);
      }
    }
  };

  // Within a plane, from its first element.
  int64_t offset(int64_t phase_z, int64_t phase_y, int64_t phase_x, int64_t at_z, int64_t at_y, int64_t at_x) const {
    const int64_t phase = (phase_z * y.count() + phase_y) * x.count() + phase_x;
    return phase * phase_size() + (at_z * y.length + at_y) * x.length + at_x;
  }

  // Where taps share rows, the registers of a column are rows of the image, and a register's lanes are pixels side by side.
  // Where these do not fill registers, columns may be cut into `fold` pieces, put side by side as well. Rows between pieces
  // are then filled twice, so a cut must save a tenth of the products.
  int64_t fold(const Layout& layout, int64_t width) const {
    int64_t best = 1;
    for (int64_t pieces = 2; pieces <= std::min(width, window.y.out()); ++pieces) {
      if (window.y.out() % pieces != 0) continue;
      if (products(layout, folded(width, pieces)) * 10 <= products(layout, folded(width, best)) * 9) best = pieces;
    }
    return best;
  }

  // Products that a slot takes the time of: a panel of few registers waits for the sums of the slot before, which takes as
  // long as 8 products.
  static int64_t products(const Layout& layout, const Grid& grid) {
    const int64_t panels = (grid.rows + layout.registers - 1) / layout.registers;
    return grid.columns * std::max(grid.rows * layout.together, panels * 8);
  }

  Grid folded(int64_t width, int64_t pieces) const {
    const int64_t lanes = window.images * window.z.out() * window.x.out() * pieces;
    return {(lanes + width - 1) / width, window.y.out() / pieces};
  }

  Grid grid(const Layout& layout, int64_t width) const {
    if (layout.shares_rows()) return folded(width, fold(layout, width));
    return {1, (window.images * window.pixels() + width - 1) / width};
  }

  // The registers [first, last) of a column.
  Cursor cursor(const Layout& layout, int64_t width, int64_t column, int64_t first, int64_t last) const {
    return layout.shares_rows() ? shared_cursor(layout, width, column, first, last)
                                : tap_cursor(first * width, std::min(window.images * window.pixels(), last * width));
  }

 private:
  Cursor tap_cursor(int64_t token0, int64_t token1) const {
    // A tenth of the time of a 1x1 convolution at 1:4v4.
    constexpr int64_t kAhead = 12;
    Cursor cursor{*this, {}, {{0, token0, token1 - token0}}, kAhead, 0};
    const int64_t width = window.x.out(), slice = width * window.y.out(), pixels = window.pixels();
    for (int64_t t = token0, left = 0; t < token1;) {
      const int64_t image = t / pixels, pixel = t % pixels, column = pixel % width;
      // Where no padding lies between rows, the rest of the slice is one run; where none lies between slices, of the image.
      left = x.length != width ? width - column : y.length != window.y.out() ? slice - pixel % slice : pixels - pixel;
      left = std::min(left, token1 - t);
      const int64_t row = pixel / slice * y.length + pixel % slice / width;
      const int64_t from = image * window.channels * plane_size() + row * x.length + column;
      for (int64_t i = 0; i < left; i += kPiece) cursor.pieces.push_back({from + i, t - token0 + i});
      t += left;
    }
    cursor.asked = cursor.pieces.size();
    return cursor;
  }

  Cursor shared_cursor(const Layout& layout, int64_t width, int64_t column, int64_t first, int64_t last) const {
    constexpr int64_t kAhead = 2;
    Cursor cursor{*this, {}, {}, kAhead, 0};
    const int64_t pieces = fold(layout, width), height = window.y.out() / pieces, row_width = window.x.out();
    // Lanes lie (image, z, piece, x). Those of one row of one image are copied together.
    struct Part {
      int64_t lane, count, image, z, y, x;
    };
    std::vector<Part> parts;
    const int64_t lanes = window.images * window.z.out() * row_width * pieces;
    for (int64_t lane = column * width, end = std::min(lanes, lane + width), count; lane < end; lane += count) {
      count = std::min(end - lane, row_width - lane % row_width);
      const int64_t row = lane / row_width, plane = row / pieces;
      parts.push_back({lane % width, count, plane / window.z.out(), plane % window.z.out(), row % pieces * height + first,
                       lane % row_width});
    }
    for (int64_t i = 0; i < static_cast<int64_t>(layout.shared.rows.size()); ++i) {
      const SharedRows::Row& row = layout.shared.rows[i];
      if (row.element - y.least(row.phase) >= last - first + y.span(row.phase)) continue;  // of a shorter panel than most
      for (const Part& part : parts) {
        const int64_t from = part.image * window.channels * plane_size() +
                             offset(z.slot[row.z], row.phase, x.slot[row.x], part.z + z.shift[row.z],
                                    part.y + row.element, part.x + x.shift[row.x]);
        cursor.pieces.push_back({from, i * width + part.lane});
      }
      if (row.z == 0 && row.x == 0) cursor.asked = cursor.pieces.size();
    }
    for (int64_t i = 0; i < last - first; ++i)
      for (const Part& part : parts)
        cursor.tokens.push_back({i * width + part.lane,
                                 ((part.image * window.z.out() + part.z) * window.y.out() + part.y + i) * row_width + part.x,
                                 part.count});
    return cursor;
  }

 public:
  // Whether the image itself, channel-major, already is what this reads.
  bool is_identity() const {
    const auto plain = [](const Split& axis) { return axis.stride == 1 && axis.padding == 0; };
    return plain(z) && plain(y) && plain(x);
  }
};

namespace detail {

// The elements [first, last) of one row of a phase lie inside the image; the rest is padding.
struct Inside {
  int64_t first, last;

  Inside(const Split& axis, int64_t slot, int64_t size) {
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
  const Split &z = planes.z, &y = planes.y, &x = planes.x;
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
  const Split &z = planes.z, &y = planes.y, &x = planes.x;
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
