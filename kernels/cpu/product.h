// The innermost loops: one block of K, one panel of tokens, a run of channel groups. Accumulators stay in registers.
#pragma once

#include <array>
#include <utility>

#include "layout.h"

namespace sparsedm {

// What the loops read and write.
//   panel  [row][Tile::tokens], the activations of this block
//   out    [channel][Tile::tokens], sums so far; in the first block sums start from `bias` instead
struct Block {
  const float* values;
  const int16_t* index;
  int64_t kept;
  int64_t groups;
  const char* panel;
  float* out;
  const float* bias;  // null but in the first block
};

template <int channels, int vectors>
inline void start(Vec (&sum)[channels][vectors], const float* const (&out)[channels], const float* const (&bias)[channels],
                  bool from_bias) {
  SPARSEDM_UNROLL
  for (int c = 0; c < channels; ++c) {
    SPARSEDM_UNROLL
    for (int r = 0; r < vectors; ++r) sum[c][r] = from_bias ? broadcast(*bias[c]) : load(out[c] + r * kWidth);
  }
}

template <int channels, int vectors>
inline void finish(const Vec (&sum)[channels][vectors], float* const (&out)[channels]) {
  SPARSEDM_UNROLL
  for (int c = 0; c < channels; ++c) {
    SPARSEDM_UNROLL
    for (int r = 0; r < vectors; ++r) store(out[c] + r * kWidth, sum[c][r]);
  }
}

// Adds the product of one shared row with `channels` weights.
template <int channels, int vectors>
inline void shared_row(Vec (&sum)[channels][vectors], const float* row, const float* values) {
  Vec weight[channels];
  SPARSEDM_UNROLL
  for (int c = 0; c < channels; ++c) weight[c] = broadcast(values[c]);
  SPARSEDM_UNROLL
  for (int r = 0; r < vectors; ++r) {
    const Vec x = load(row + r * kWidth);
    SPARSEDM_UNROLL
    for (int c = 0; c < channels; ++c) sum[c][r] += x * weight[c];
  }
}

inline const float* row_at(const char* panel, int16_t offset) { return reinterpret_cast<const float*>(panel + offset); }

template <int channels, int vectors>
void multiply_groups(const Block& block) {
  constexpr int stride = Tile<channels>::tokens;
  const float* values = block.values;
  const int16_t* index = block.index;
  float* out = block.out;
  for (int64_t g = 0; g < block.groups; ++g) {
    Vec sum[channels][vectors];
    float* rows[channels];
    const float* old[channels];
    const float* bias[channels];
    SPARSEDM_UNROLL
    for (int c = 0; c < channels; ++c) {
      old[c] = rows[c] = out + c * stride;
      bias[c] = block.bias + g * channels + c;
    }
    start(sum, old, bias, block.bias != nullptr);
#pragma GCC unroll 2
    for (int64_t i = 0; i < block.kept; ++i) shared_row(sum, row_at(block.panel, index[i]), values + i * channels);
    finish(sum, rows);
    values += block.kept * channels;
    index += block.kept;
    out += channels * stride;
  }
}

// Two channels whose masks differ: the rows that both keep are loaded once for two products. A block at 2:4 keeps half its
// rows, and the best partner among 128 channels shares about two thirds of them, which is enough to be bound by
// multiplications (115 GFLOP/s) and no longer by loads (91).
template <int vectors>
void multiply_pairs(const Block& block) {
  constexpr int stride = Tile<2>::tokens;
  const float* values = block.values;
  const int16_t* index = block.index;
  for (int64_t g = 0; g < block.groups; ++g) {
    const int64_t shared = index[0], own = block.kept - shared;
    Vec sum[2][vectors];
    float* const rows[2] = {block.out + index[1] * stride, block.out + index[2] * stride};
    const float* const old[2] = {rows[0], rows[1]};
    const float* const bias[2] = {block.bias + index[1], block.bias + index[3]};
    start(sum, old, bias, block.bias != nullptr);
    index += Layout::kHeader;
#pragma GCC unroll 2
    for (int64_t i = 0; i < shared; ++i) shared_row(sum, row_at(block.panel, index[i]), values + i * 2);
    values += shared * 2;
    index += shared;
#pragma GCC unroll 2
    for (int64_t i = 0; i < own; ++i) {
      SPARSEDM_UNROLL
      for (int c = 0; c < 2; ++c) {
        const Vec weight = broadcast(values[i * 2 + c]);
        const float* row = row_at(block.panel, index[i * 2 + c]);
        SPARSEDM_UNROLL
        for (int r = 0; r < vectors; ++r) sum[c][r] += load(row + r * kWidth) * weight;
      }
    }
    values += own * 2;
    index += own * 2 + shared;
    finish(sum, rows);
  }
}

using Multiply = void (*)(const Block&);

template <int channels, bool pairs, int... vectors>
constexpr std::array<Multiply, sizeof...(vectors)> multiply_table(std::integer_sequence<int, vectors...>) {
  if constexpr (pairs) {
    return {multiply_pairs<vectors + 1>...};
  } else {
    return {multiply_groups<channels, vectors + 1>...};
  }
}

// The loops for a panel of `vectors` registers; each count has its own code, so that no panel carries a bad tail.
template <int channels, bool pairs>
Multiply multiply_for(int64_t vectors) {
  static constexpr auto table =
      multiply_table<channels, pairs>(std::make_integer_sequence<int, Tile<channels>::vectors>{});
  return table[vectors - 1];
}

}  // namespace sparsedm
