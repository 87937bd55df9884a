// The innermost loops: one block of K, one panel of tokens, a run of channel groups. Accumulators stay in registers.
#pragma once

#include <array>
#include <utility>

#include "layout.h"

namespace sparsedm {

// What the loops read and write.
//   panel  [row][Tile::tokens], the activations of this block
//   out    [channel][Tile::tokens], sums so far; in the first block sums start from `bias` instead
template <class T>
struct Block {
  const T* values;
  const int16_t* index;
  int64_t slots;
  int64_t groups;
  const char* panel;
  float* out;
  const float* bias;  // null but in the first block
  bool last;          // of the blocks
};

// One step along K: a row of floats and its weights.
template <class Panel>
struct Step {
  const float* row;

  Step(const char* panel, const int16_t* index) : row(reinterpret_cast<const float*>(panel + *index)) {}

  void fetch(int r, Vec (&x)[1]) const { x[0] = load(row + r * kWidth); }

  template <class T>
  static Vec weight(const T* values) {
    return broadcast(static_cast<float>(*values));
  }

  static void multiply_add(Vec& sum, Vec x, Vec weight) { sum += x * weight; }
  static void straighten(Vec (&)[1]) {}
};

#if SPARSEDM_BF16_PAIRS
// Two rows of bfloat16, interleaved on the way, and pairs of weights: twice the multiplications per instruction. Two
// interleaving instructions serve two multiplications of each channel: 4 channels reach 190 GFLOP/s of 231, 2 reach 184,
// pairs at 2:4 160. Converted to floats, 2:4 loses to the bfloat16 of oneDNN.
template <>
struct Step<BFloat16> {
  const __m512i *a, *b;

  Step(const char* panel, const int16_t* index)
      : a(reinterpret_cast<const __m512i*>(panel + index[0])), b(reinterpret_cast<const __m512i*>(panel + index[1])) {}

  void fetch(int r, Vec (&x)[2]) const {
    const __m512i first = _mm512_loadu_si512(a + r), second = _mm512_loadu_si512(b + r);
    x[0] = (Vec)_mm512_unpacklo_epi16(first, second);
    x[1] = (Vec)_mm512_unpackhi_epi16(first, second);
  }

  static Vec weight(const BFloat16* values) {
    float pair;
    std::memcpy(&pair, values, sizeof(pair));
    return (Vec)_mm512_set1_ps(pair);
  }

  static void multiply_add(Vec& sum, Vec x, Vec weight) {
    sum = (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)weight);
  }

  // Interleaving goes by quarters of a register: the sums of each four tokens out of eight.
  static void straighten(Vec (&sum)[2]) {
    const Vec low = sum[0], high = sum[1];
    sum[0] = detail::pick<0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23>(low, high);
    sum[1] = detail::pick<8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31>(low, high);
  }
};
#endif

template <int channels, int registers, int step>
using Accumulators = Vec[channels][registers][step];

template <int channels, int registers, int step>
inline void start(Accumulators<channels, registers, step>& sum, const float* const (&out)[channels],
                  const float* const (&bias)[channels], bool from_bias) {
  SPARSEDM_UNROLL
  for (int c = 0; c < channels; ++c) {
    SPARSEDM_UNROLL
    for (int r = 0; r < registers; ++r) {
      SPARSEDM_UNROLL
      for (int h = 0; h < step; ++h)
        sum[c][r][h] = from_bias ? broadcast(*bias[c]) : load(out[c] + (r * step + h) * kWidth);
    }
  }
}

template <class Panel, int channels, int registers, int step>
inline void finish(Accumulators<channels, registers, step>& sum, float* const (&out)[channels], bool last) {
  SPARSEDM_UNROLL
  for (int c = 0; c < channels; ++c) {
    SPARSEDM_UNROLL
    for (int r = 0; r < registers; ++r) {
      if (last) Step<Panel>::straighten(sum[c][r]);
      SPARSEDM_UNROLL
      for (int h = 0; h < step; ++h) store(out[c] + (r * step + h) * kWidth, sum[c][r][h]);
    }
  }
}

// Adds the product of a shared step with the weights of `channels`, from the first given.
template <int channels, class Panel, class T, int all, int registers, int step>
inline void multiply(Accumulators<all, registers, step>& sum, int first, const Step<Panel>& rows, const T* values) {
  Vec weight[channels];
  SPARSEDM_UNROLL
  for (int c = 0; c < channels; ++c) weight[c] = Step<Panel>::weight(values + c * step);
  SPARSEDM_UNROLL
  for (int r = 0; r < registers; ++r) {
    Vec x[step];
    rows.fetch(r, x);
    if constexpr (channels > 1 && step == 1) x[0] = loaded(x[0]);
    SPARSEDM_UNROLL
    for (int c = 0; c < channels; ++c) {
      SPARSEDM_UNROLL
      for (int h = 0; h < step; ++h) Step<Panel>::multiply_add(sum[first + c][r][h], x[h], weight[c]);
    }
  }
}

// Weights stream by once per panel, in order. The processor foresees that within a page alone, and a group of channels takes
// little longer than memory to answer: so each group calls for what comes `kAhead` bytes later, as much as it uses itself.
constexpr int64_t kAhead = 4096;

inline void call_for(const void* next, int64_t bytes) {
  const char* line = static_cast<const char*>(next) + kAhead;
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(line + i, 0, 2);
}

template <class T, int channels, int registers>
void multiply_groups(const Block<T>& block) {
  using Panel = typename PanelOf<T>::type;
  using Size = Tile<channels, Panel>;
  const T* values = block.values;
  const int16_t* index = block.index;
  float* out = block.out;
  for (int64_t g = 0; g < block.groups; ++g) {
    Accumulators<channels, registers, Size::step> sum;
    float* rows[channels];
    const float* old[channels];
    const float* bias[channels];
    SPARSEDM_UNROLL
    for (int c = 0; c < channels; ++c) {
      old[c] = rows[c] = out + c * Size::tokens;
      bias[c] = block.bias + g * channels + c;
    }
    start(sum, old, bias, block.bias != nullptr);
    call_for(values, block.slots * channels * sizeof(T));
    call_for(index, block.slots * sizeof(*index));
#pragma GCC unroll 2
    for (int64_t i = 0; i < block.slots; i += Size::step)
      multiply<channels>(sum, 0, Step<Panel>(block.panel, index + i), values + i * channels);
    finish<Panel>(sum, rows, block.last);
    values += block.slots * channels;
    index += block.slots;
    out += channels * Size::tokens;
  }
}

// Two channels whose masks differ: the rows that both keep are loaded once for two products. A block at 2:4 keeps half its
// rows, and the best partner among 128 channels shares about two thirds of them. A row of one channel alone needs a load for
// each multiplication, more than the processor has (72 GFLOP/s of 98 on Zen 3): shared rows, which need half as many, go
// between them (90, and 85 one kind after the other).
template <class T, int registers>
void multiply_pairs(const Block<T>& block) {
  using Panel = typename PanelOf<T>::type;
  using Size = Tile<2, Panel>;
  const T* values = block.values;
  const int16_t* index = block.index;
  for (int64_t g = 0; g < block.groups; ++g) {
    const int64_t shared = index[0], own = block.slots - shared;
    Accumulators<2, registers, Size::step> sum;
    float* const rows[2] = {block.out + index[1] * Size::tokens, block.out + index[2] * Size::tokens};
    const float* const old[2] = {rows[0], rows[1]};
    const float* const bias[2] = {block.bias + index[1], block.bias + index[3]};
    start(sum, old, bias, block.bias != nullptr);
    call_for(values, block.slots * 2 * sizeof(T));
    call_for(index, block.slots * 2 * sizeof(*index));
    index += Layout::kHeader;
    const T* own_values = values + shared * 2;
    const int16_t* own_index = index + shared;
    const auto add_shared = [&](int64_t i) {
      multiply<2>(sum, 0, Step<Panel>(block.panel, index + i), values + i * 2);
    };
    const auto add_own = [&](int64_t i) {
      SPARSEDM_UNROLL
      for (int c = 0; c < 2; ++c)
        multiply<1>(sum, c, Step<Panel>(block.panel, own_index + i * 2 + c * Size::step), own_values + i * 2 + c * Size::step);
    };
    const int64_t both = std::min(shared, own);
    int64_t i = 0;
    for (; i < both; i += Size::step) {
      add_shared(i);
      add_own(i);
    }
#pragma GCC unroll 2
    for (int64_t j = i; j < shared; j += Size::step) add_shared(j);
    for (int64_t j = i; j < own; j += Size::step) add_own(j);
    values = own_values + own * 2;
    index = own_index + own * 2 + shared;
    finish<Panel>(sum, rows, block.last);
  }
}

template <class T>
using Multiply = void (*)(const Block<T>&);

template <class T, int channels, bool pairs, int... registers>
constexpr std::array<Multiply<T>, sizeof...(registers)> multiply_table(std::integer_sequence<int, registers...>) {
  if constexpr (pairs) {
    return {multiply_pairs<T, registers + 1>...};
  } else {
    return {multiply_groups<T, channels, registers + 1>...};
  }
}

// The loops for a panel of so many registers; each count has its own code, so that no panel carries a bad tail.
template <class T, int channels, bool pairs>
Multiply<T> multiply_for(int64_t registers) {
  using Size = Tile<channels, typename PanelOf<T>::type>;
  static constexpr auto table =
      multiply_table<T, channels, pairs>(std::make_integer_sequence<int, Size::registers>{});
  return table[registers - 1];
}

}  // namespace sparsedm
