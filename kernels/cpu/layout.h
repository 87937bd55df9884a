// Where each kept weight lies in a packed weight, and the tile sizes that decide it.
//
// The reduction axis K is (tap, c_in) for a convolution and in_features for a linear layer. It is cut into blocks whose
// activations, for one panel of tokens, fit the L1 cache; a packed weight is block after block, and within a block
// channel group after channel group. Offsets are byte offsets of a row in the panel, so the product kernel adds them
// to a pointer and nothing else.
#pragma once

#include <algorithm>
#include <cstdint>

#include "half.h"

namespace sparsedm {

// Activations of one panel and one block of K: what stays in a 32 KB L1 cache beside the streams of weights.
constexpr int kPanelBytes = 24 * 1024;
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

// v = 1: channels are paired within each block by how many rows they share ("pairs"). v >= 2: masks coincide by
// construction, and 2 or 4 channels go together.
struct Layout {
  int64_t n, m, v;
  int64_t out;       // N, output channels
  int64_t channels;  // C_in
  int64_t taps;      // of the convolution kernel, 1 for linear
  int64_t step;      // rows that one multiplication takes; the rows of each loop are a multiple of it
  int64_t together;  // channels per group: 2 or 4
  int64_t row_bytes;
  int64_t blocks;

  template <class Panel>
  Layout(int64_t n_, int64_t m_, int64_t v_, int64_t out_, int64_t channels_, int64_t taps_, Panel)
      : n(n_), m(m_), v(v_), out(out_), channels(channels_), taps(taps_), step(kStep<Panel>),
        together(v_ >= 4 ? kMostTogether : 2) {
    row_bytes = together == 4 ? Tile<4, Panel>::row_bytes : Tile<2, Panel>::row_bytes;
    const int64_t rows = together == 4 ? Tile<4, Panel>::rows : Tile<2, Panel>::rows;
    const int64_t most = std::max<int64_t>(rows / m / step, 1);
    blocks = (portions() + most - 1) / most;
  }

  bool pairs() const { return v == 1; }
  // Along K, how many times n of m are chosen.
  int64_t choices() const { return taps * channels / m; }
  // First choice of a block; blocks are as even as can be, and all but the last hold a multiple of `step` rows.
  int64_t first(int64_t block) const { return std::min(portions() * block / blocks * step, choices()); }
  int64_t kept(int64_t block) const { return (first(block + 1) - first(block)) * n; }
  // Kept rows and what fills the last step: weights of zero.
  int64_t slots(int64_t block) const { return (kept(block) + step - 1) / step * step; }
  int64_t groups() const { return (out + together - 1) / together; }
  int64_t groups_per_unit() const { return kUnit / together; }
  int64_t units() const { return (out + kUnit - 1) / kUnit; }

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
  // Of `step` choices.
  int64_t portions() const { return (choices() + step - 1) / step; }
  int64_t slots_before(int64_t block) const { return (first(block) * n + step - 1) / step * step; }
};

}  // namespace sparsedm
