// Where each kept weight lies in a packed weight, and the tile sizes that decide it.
//
// The reduction axis K is in_features for a linear layer and all (tap, c_in) for a convolution. It is cut into blocks whose
// activations, for one panel of tokens, fit the L1 cache; a packed weight is block after block, and within a block
// channel group after channel group. Offsets are byte offsets into the panel, so the product kernel adds them to a pointer
// and nothing else.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

#include "half.h"

namespace sparsedm {

// Activations of one panel and one block of K: what stays in a 32 KB L1 cache beside the streams of weights.
constexpr int kPanelBytes = 24 * 1024;
// The same where taps share rows: blocks of K are long anyway, and 16 KB gain 3 to 4 % over 24 at 2:4 and 2:4v4 (Zen 3, vectors
// of 32 bytes). With vectors of 64, where a row is twice as long, blocks would get short.
constexpr int kSharedBytes = kBytes == 64 ? kPanelBytes : 16 * 1024;
// Output channels are handled in units, so that work can be cut between threads at fixed places.
constexpr int64_t kUnit = 128;
// 4 channels x 3 vectors and their weights need 17 registers: with the 16 of AVX2 they spill (52 GFLOP/s where 2 x 6 reach
// 111), so there channels go by twos whatever v is.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int64_t kMostTogether = 4;
#else
constexpr int64_t kMostTogether = 2;
#endif

// How `channels` output channels that share their rows are computed at once: `registers` of tokens for each, every one
// `step` registers of sums.
// Measured on Zen 4 (GFLOP/s of 115.7, AVX-512): 2 channels x 6 vectors 115, 4 x 3 117; one channel alone 91 whatever
// its width, because every multiplication then needs its own load. Pairs of bfloat16 for 4 channels: 3 registers gain
// nothing over 2.
template <int channels, class Panel>
struct Tile {
  static constexpr int step = kStep<Panel>;
  static constexpr int registers = step == 1 ? 12 / channels : channels == 4 ? 2 : 3;
  static constexpr int width = kBytes / static_cast<int>(sizeof(Panel));  // tokens of a register
  static constexpr int tokens = registers * width;
  static constexpr int row_bytes = tokens * static_cast<int>(sizeof(Panel));
  static constexpr int rows = std::min(kPanelBytes / row_bytes, 256);
};

// One axis of a convolution kernel.
struct KernelAxis {
  int64_t size = 1, stride = 1, dilation = 1;

  int64_t reach() const { return dilation * (size - 1) + 1; }
};

// An axis split by stride phase: position p is element p / stride of phase p % stride, so that a tap reads neighbours for
// neighbouring outputs whatever the stride is. Only phases that some tap reads are kept.
struct Phases {
  std::vector<int64_t> kept;         // phases, in the order stored
  std::vector<int64_t> slot, shift;  // per tap: index into `kept`, first element

  explicit Phases(const KernelAxis& axis) {
    std::vector<int64_t> slot_of(axis.stride, -1);
    for (int64_t tap = 0; tap < axis.size; ++tap) {
      const int64_t phase = tap * axis.dilation % axis.stride;
      if (slot_of[phase] < 0) {
        slot_of[phase] = static_cast<int64_t>(kept.size());
        kept.push_back(phase);
      }
      slot.push_back(slot_of[phase]);
      shift.push_back(tap * axis.dilation / axis.stride);
    }
  }

  int64_t count() const { return static_cast<int64_t>(kept.size()); }
  int64_t taps() const { return static_cast<int64_t>(slot.size()); }
  // Elements from the first to the last that the taps of a phase shift by; the first tap of a phase shifts least.
  int64_t span(int64_t slot_) const {
    int64_t least = -1, most = 0;
    for (size_t tap = 0; tap < slot.size(); ++tap) {
      if (slot[tap] != slot_) continue;
      if (least < 0) least = shift[tap];
      most = shift[tap];
    }
    return most - least;
  }
  int64_t least(int64_t slot_) const { return shift[std::find(slot.begin(), slot.end(), slot_) - slot.begin()]; }
};

// The axes z, y, x of a convolution kernel; all of size 1 for a linear layer.
using KernelAxes = std::array<KernelAxis, 3>;

// A panel that the taps along y share. Its registers are rows of the image, one below the other, so that what the tap below
// reads is the next register: a panel holds, for each channel and each tap along z and x, every row that some tap along y
// reads, once. For 3 x 3 and 6 registers these are 24 where a panel of its own for each tap (im2col) has 54, so that filling
// costs less than half, and a block of K is twice as long.
struct SharedRows {
  struct Row {
    int64_t z, x;     // taps
    int64_t phase;    // along y, an index into Phases::kept
    int64_t element;  // of the phase, from the panel's first row on
  };
  std::vector<Row> rows;         // of one channel: what each register of the panel holds, for the first of its outputs
  std::vector<int64_t> tap_row;  // of each tap (z, y, x): the first register that it reads

  SharedRows() = default;

  // How many rows there would be.
  static int64_t count(const KernelAxes& axes, int64_t registers) {
    const Phases y(axes[1]);
    int64_t rows = 0;
    for (int64_t phase = 0; phase < y.count(); ++phase) rows += registers + y.span(phase);
    return axes[0].size * axes[2].size * rows;
  }

  SharedRows(const KernelAxes& axes, int64_t registers) {
    const Phases y(axes[1]);
    for (int64_t z = 0; z < axes[0].size; ++z) {
      std::vector<int64_t> first(y.count() * axes[2].size);
      for (int64_t x = 0; x < axes[2].size; ++x) {
        for (int64_t phase = 0; phase < y.count(); ++phase) {
          first[phase * axes[2].size + x] = static_cast<int64_t>(rows.size());
          for (int64_t i = 0; i < registers + y.span(phase); ++i) rows.push_back({z, x, phase, y.least(phase) + i});
        }
      }
      for (int64_t tap = 0; tap < axes[1].size; ++tap)
        for (int64_t x = 0; x < axes[2].size; ++x)
          tap_row.push_back(first[y.slot[tap] * axes[2].size + x] + y.shift[tap] - y.least(y.slot[tap]));
    }
  }
};

// v = 1: channels are paired within each block by how many rows they share ("pairs"). v >= 2: masks coincide by
// construction, and 2 or 4 channels go together.
struct Layout {
  int64_t n, m, v;
  int64_t out;       // N, output channels
  int64_t channels;  // C_in
  int64_t taps;      // of the convolution kernel, 1 for linear
  int64_t step;      // rows that one multiplication takes; the rows of each loop are a multiple of it
  int64_t together;  // channels per group: 2 or 4
  int64_t registers; // of tokens, in the largest panel
  int64_t row_bytes; // from one row of a panel to the next; where taps share a panel, from one channel to the next
  int64_t blocks;
  SharedRows shared; // empty where every tap has rows of its own

  template <class Panel>
  Layout(int64_t n_, int64_t m_, int64_t v_, int64_t out_, int64_t channels_, const KernelAxes& axes, Panel)
      : n(n_), m(m_), v(v_), out(out_), channels(channels_), taps(axes[0].size * axes[1].size * axes[2].size),
        step(kStep<Panel>), together(v_ >= 4 ? kMostTogether : 2),
        registers(together == 4 ? Tile<4, Panel>::registers : Tile<2, Panel>::registers) {
    row_bytes = together == 4 ? Tile<4, Panel>::row_bytes : Tile<2, Panel>::row_bytes;
    const int64_t rows = together == 4 ? Tile<4, Panel>::rows : Tile<2, Panel>::rows;
    int64_t most = std::max<int64_t>(rows / m / step, 1);
    const int64_t shared_bytes = SharedRows::count(axes, registers) * kBytes;
    const int64_t most_shared = kSharedBytes / shared_bytes / m / step;
    if (shared_bytes < taps * row_bytes && most_shared > 0) {
      shared = SharedRows(axes, registers);
      most = most_shared;
      row_bytes = shared_bytes;
    }
    blocks = (portions() + most - 1) / most;
  }

  bool pairs() const { return v == 1; }
  bool shares_rows() const { return !shared.rows.empty(); }
  // Along K, how many times n of m are chosen.
  int64_t choices() const { return taps * channels / m; }
  // First choice of a block; blocks are as even as can be, and all but the last hold a multiple of `step` rows.
  int64_t first(int64_t block) const { return std::min(portions() * block / blocks * portion(), choices()); }
  int64_t kept(int64_t block) const { return (first(block + 1) - first(block)) * n; }
  // Kept rows and what fills the last step: weights of zero.
  int64_t slots(int64_t block) const { return (kept(block) + step - 1) / step * step; }
  int64_t groups() const { return (out + together - 1) / together; }
  int64_t groups_per_unit() const { return kUnit / together; }
  int64_t units() const { return (out + kUnit - 1) / kUnit; }

  // One step along K: where its weight stands among those of a channel (C_in, taps), and its row in the panel of its block.
  struct Row {
    int64_t place, offset;
  };
  // The i-th of a block, in the order of choices. Along K tap comes before channel, so that the m rows of a choice are
  // neighbours along c_in: over all channels where each tap has rows of its own, else over those of a block.
  Row row(int64_t block, int64_t i) const {
    if (!shares_rows()) {
      const int64_t k = first(block) * m + i;
      return {k % channels * taps + k / channels, i * row_bytes};
    }
    const int64_t count = first_channel(block + 1) - first_channel(block), tap = i / count, c = i % count;
    return {(first_channel(block) + c) * taps + tap, c * row_bytes + shared.tap_row[tap] * kBytes};
  }
  // Of a block whose taps share rows: it holds all taps of some channels.
  int64_t first_channel(int64_t block) const { return first(block) / taps * m; }

  // Where one of `lanes` channels has its weight of a slot, and a row of its own its offset: step by step, and in each
  // step channel by channel.
  int64_t place(int64_t slot, int64_t lane, int64_t lanes) const {
    return (slot / step * lanes + lane) * step + slot % step;
  }

  // Pairs: a header of four, then shared rows, then alternately a step of each. Room for "none shared" is always kept,
  // so that the size depends on the shape alone.
  static constexpr int64_t kHeader = 4;
  int64_t index_per_group(int64_t block) const { return pairs() ? kHeader + 2 * slots(block) : slots(block); }

  int64_t values_at(int64_t block, int64_t group) const {
    return (slots_before(block) * groups() + group * slots(block)) * together;
  }
  int64_t index_at(int64_t block, int64_t group) const {
    const int64_t before = slots_before(block) * (pairs() ? 2 : 1) + (pairs() ? kHeader * block : 0);
    return before * groups() + group * index_per_group(block);
  }
  int64_t values_size() const { return values_at(blocks, 0); }
  int64_t index_size() const { return index_at(blocks, 0); }

 private:
  // Blocks are cut at multiples of so many choices.
  int64_t portion() const { return shares_rows() ? step * taps : step; }
  int64_t portions() const { return (choices() + portion() - 1) / portion(); }
  int64_t slots_before(int64_t block) const { return (first(block) * n + step - 1) / step * step; }
};

}  // namespace sparsedm
