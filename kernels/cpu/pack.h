// Masking and packing in one pass over the weight, and back.
#pragma once

#include <ATen/Parallel.h>
#include <c10/util/Exception.h>

#include <cmath>
#include <vector>

#include "layout.h"

namespace sparsedm {

// The part of a weight that one unit of channels and one block of K hold, while it is packed.
template <class T>
class Packer {
 public:
  Packer(const Layout& layout, const T* weight, T* values, int16_t* index)
      : layout_(layout), weight_(weight), values_(values), index_(index) {}

  void pack(int64_t unit, int64_t block) {
    const int64_t rows = (layout_.first(block + 1) - layout_.first(block)) * layout_.m;
    places_.clear();
    offsets_.clear();
    for (int64_t i = 0; i < rows; ++i) {
      const Layout::Row row = layout_.row(block, i);
      places_.push_back(static_cast<int32_t>(row.place));
      offsets_.push_back(static_cast<int16_t>(row.offset));
    }
    if (layout_.pairs()) {
      pack_pairs(unit, block);
    } else {
      pack_groups(unit, block);
    }
  }

 private:
  const T* channel_weight(int64_t channel) const { return weight_ + channel * layout_.channels * layout_.taps; }

  // The rows of this block, ascending, that the channels [channel, channel + v) keep: the n of largest magnitude of every
  // m. Magnitudes are summed over v as a chain of fp32 additions in channel order, as masks.group_scores does; among equals
  // the lower row wins.
  void choose(int64_t channel, int64_t block, int16_t* rows) const {
    const int64_t n = layout_.n, m = layout_.m;
    for (int64_t choice = layout_.first(block); choice < layout_.first(block + 1); ++choice) {
      float score[32];
      const int32_t place = places_[(choice - layout_.first(block)) * m];
      for (int64_t j = 0; j < layout_.v; ++j) {
        const T* w = channel_weight(channel + j) + place;
        for (int64_t i = 0; i < m; ++i) {
          const float magnitude = std::fabs(static_cast<float>(w[i * layout_.taps]));
          score[i] = j == 0 ? magnitude : score[i] + magnitude;
        }
      }
      int64_t found = 0;
      for (int64_t i = 0; i < m; ++i) {
        int beaten = 0;
        for (int64_t j = 0; j < i; ++j) beaten += score[j] >= score[i];
        for (int64_t j = i + 1; j < m; ++j) beaten += score[j] > score[i];
        if (beaten >= n) continue;
        TORCH_CHECK_VALUE(found < n, "weight holds NaN in output channel ", channel,
                          ": magnitudes cannot be ranked; repair the weight before packing it");
        rows[found++] = static_cast<int16_t>((choice - layout_.first(block)) * m + i);
      }
      rows += n;
    }
  }

  void pack_groups(int64_t unit, int64_t block) {
    const int64_t kept = layout_.kept(block), slots = layout_.slots(block), together = layout_.together;
    rows_.resize(kept);
    const int64_t end = std::min((unit + 1) * layout_.groups_per_unit(), layout_.groups());
    int64_t chosen = -1;
    for (int64_t g = unit * layout_.groups_per_unit(); g < end; ++g) {
      const int64_t sharing = g * together / layout_.v * layout_.v;
      if (sharing != chosen) choose(chosen = sharing, block, rows_.data());
      T* values = values_ + layout_.values_at(block, g);
      int16_t* index = index_ + layout_.index_at(block, g);
      for (int64_t i = 0; i < slots; ++i) {
        const int16_t row = rows_[std::min(i, kept - 1)];
        index[i] = offsets_[row];
        for (int64_t c = 0; c < together; ++c)
          values[layout_.place(i, c, together)] = i < kept ? channel_weight(g * together + c)[places_[row]] : T(0);
      }
    }
  }

  struct Pair {
    int64_t a, b, shared;  // b < 0: the last channel of an odd number has no partner
  };

  // Greedy: each channel takes the best partner left. Sorted by the rows shared, because runs of equal loop lengths are
  // what a branch predictor predicts.
  std::vector<Pair> match(const std::vector<uint64_t>& masks, int64_t words, int64_t channels, int64_t kept) const {
    std::vector<int64_t> left(channels);
    for (int64_t i = 0; i < channels; ++i) left[i] = i;
    std::vector<Pair> pairs;
    while (left.size() > 1) {
      const int64_t a = left.back();
      left.pop_back();
      int64_t best = -1;
      size_t partner = 0;
      for (size_t j = 0; j < left.size(); ++j) {
        int64_t shared = 0;
        for (int64_t w = 0; w < words; ++w)
          shared += __builtin_popcountll(masks[a * words + w] & masks[left[j] * words + w]);
        if (shared > best) {
          best = shared;
          partner = j;
        }
      }
      pairs.push_back({a, left[partner], best});
      left.erase(left.begin() + static_cast<std::ptrdiff_t>(partner));
    }
    if (!left.empty()) pairs.push_back({left[0], -1, kept});
    std::stable_sort(pairs.begin(), pairs.end(), [](const Pair& x, const Pair& y) { return x.shared > y.shared; });
    return pairs;
  }

  void pack_pairs(int64_t unit, int64_t block) {
    const int64_t kept = layout_.kept(block), slots = layout_.slots(block);
    const int64_t first = unit * kUnit, channels = std::min(kUnit, layout_.out - first);
    const int64_t words = ((layout_.first(block + 1) - layout_.first(block)) * layout_.m + 63) / 64;
    rows_.resize(channels * kept);
    std::vector<uint64_t> masks(channels * words, 0);
    for (int64_t c = 0; c < channels; ++c) {
      choose(first + c, block, rows_.data() + c * kept);
      for (int64_t i = 0; i < kept; ++i) {
        const int16_t row = rows_[c * kept + i];
        masks[c * words + row / 64] |= uint64_t{1} << (row % 64);
      }
    }
    int64_t g = unit * layout_.groups_per_unit();
    for (const Pair& pair : match(masks, words, channels, kept)) {
      T* values = values_ + layout_.values_at(block, g);
      int16_t* index = index_ + layout_.index_at(block, g);
      ++g;
      const bool alone = pair.b < 0;
      const int64_t shared = alone ? slots : pair.shared / layout_.step * layout_.step;
      index[0] = static_cast<int16_t>(shared);
      index[1] = static_cast<int16_t>(pair.a);
      index[2] = static_cast<int16_t>(alone ? channels : pair.b);  // a spare row of the output panel
      index[3] = static_cast<int16_t>(alone ? pair.a : pair.b);    // where a bias may be read
      index += Layout::kHeader;
      const int64_t channel[2] = {pair.a, alone ? pair.a : pair.b};
      for (int64_t side = 0; side < 2; ++side) {
        const int16_t* rows = rows_.data() + channel[side] * kept;
        const uint64_t* other = &masks[channel[1 - side] * words];
        const T* weight = channel_weight(first + channel[side]);
        const auto put = [&](int64_t slot, int16_t row, T value) {
          const int64_t at = slot < shared ? slot : shared + layout_.place(slot - shared, side, 2);
          index[at] = offsets_[row];
          values[layout_.place(slot, side, 2)] = value;
        };
        int64_t next_shared = 0, next_own = shared;
        for (int64_t i = 0; i < kept; ++i) {
          const bool both = other[rows[i] / 64] >> (rows[i] % 64) & 1;
          const int64_t slot = both && next_shared < shared ? next_shared++ : next_own++;
          put(slot, rows[i], alone && side == 1 ? T(0) : weight[places_[rows[i]]]);
        }
        for (int64_t slot = kept; slot < slots; ++slot) put(slot, rows[kept - 1], T(0));
      }
      std::fill(index + 2 * slots - shared, index + 2 * slots, static_cast<int16_t>(0));
    }
  }

  const Layout& layout_;
  const T* weight_;
  T* values_;
  int16_t* index_;
  std::vector<int32_t> places_;   // of each row of the block, within a channel's weights
  std::vector<int16_t> offsets_;  // of each row of the block, within the panel
  std::vector<int16_t> rows_;
};

template <class T>
void pack(const Layout& layout, const T* weight, T* values, int16_t* index) {
  at::parallel_for(0, layout.units() * layout.blocks, 1, [&](int64_t begin, int64_t end) {
    Packer<T> packer(layout, weight, values, index);
    for (int64_t task = begin; task < end; ++task) packer.pack(task / layout.blocks, task % layout.blocks);
  });
}

// `weight` is zero on entry.
template <class T>
void unpack(const Layout& layout, const T* values, const int16_t* index, T* weight) {
  // Of each block, the place of the weight that goes with a register of the panel.
  std::vector<std::vector<int32_t>> places(layout.blocks, std::vector<int32_t>(kPanelBytes / kBytes));
  for (int64_t block = 0; block < layout.blocks; ++block) {
    for (int64_t i = 0; i < (layout.first(block + 1) - layout.first(block)) * layout.m; ++i) {
      const Layout::Row row = layout.row(block, i);
      places[block][row.offset / kBytes] = static_cast<int32_t>(row.place);
    }
  }
  const auto put = [&](int64_t channel, int64_t block, int16_t offset, T value) {
    weight[channel * layout.channels * layout.taps + places[block][offset / kBytes]] = value;
  };
  at::parallel_for(0, layout.groups(), 16, [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) {
      for (int64_t block = 0; block < layout.blocks; ++block) {
        const T* v = values + layout.values_at(block, g);
        const int16_t* i = index + layout.index_at(block, g);
        const int64_t kept = layout.kept(block), together = layout.together;
        if (!layout.pairs()) {
          for (int64_t j = 0; j < kept; ++j)
            for (int64_t c = 0; c < together; ++c) put(g * together + c, block, i[j], v[layout.place(j, c, together)]);
          continue;
        }
        const int64_t shared = i[0], unit = g / layout.groups_per_unit() * kUnit;
        for (int64_t side = 0; side < 2; ++side) {
          const int64_t channel = unit + i[1 + side];
          if (channel >= layout.out) continue;
          for (int64_t j = 0; j < kept; ++j) {
            const int64_t at = j < shared ? j : shared + layout.place(j - shared, side, 2);
            put(channel, block, i[Layout::kHeader + at], v[layout.place(j, side, 2)]);
          }
        }
      }
    }
  });
}

}  // namespace sparsedm
