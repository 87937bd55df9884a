// The driver: cuts a layer into panels of tokens x runs of output channels, and gives them to threads.
#pragma once

#include <ATen/Parallel.h>

#include <memory>

#include "epilogue.h"
#include "product.h"

namespace sparsedm {

// Sums of so many output channels lie in the L2 cache while the blocks of K pass by. Panels are filled once per chunk, so
// chunks are large.
constexpr int64_t kSumBytes = 400 * 1024;

// A buffer that a thread keeps: allocating 200 KB anew for each panel would fault its pages in each time.
class Scratch {
 public:
  float* get(int64_t floats) {
    if (floats > size_) {
      data_.reset(static_cast<float*>(std::aligned_alloc(64, (floats * sizeof(float) + 63) / 64 * 64)));
      TORCH_CHECK(data_ != nullptr, "out of memory: ", floats * sizeof(float), " bytes for a panel");
      std::fill(data_.get(), data_.get() + floats, 0.0f);  // lanes past the last token are computed, never used
      size_ = floats;
    }
    return data_.get();
  }

 private:
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  std::unique_ptr<float, Free> data_;
  int64_t size_ = 0;
};

// How the work is cut: panels x chunks, both as even as can be.
struct Cut {
  int64_t panels, chunks;

  Cut(int64_t vectors, int64_t most_vectors, int64_t units, int64_t threads) {
    const int64_t most_units = kSumBytes / (kUnit * most_vectors * kBytes);
    panels = (vectors + most_vectors - 1) / most_vectors;
    chunks = (units + most_units - 1) / most_units;
    if (panels * chunks % threads == 0 || panels * chunks >= 16 * threads) return;
    // Uneven over the threads: cut the channels finer (a panel is then filled more often, which is cheap), or where there
    // are too few channels, the tokens.
    const int64_t finer = (chunks + threads - 1) / threads * threads;
    if (finer <= units) {
      chunks = finer;
    } else {
      panels = std::min(vectors, (panels + threads - 1) / threads * threads);
    }
  }
};

template <int channels, bool pairs, class Source, class Sink>
void run(const Layout& layout, const float* values, const int16_t* index, const float* bias, Activation activation,
         int64_t tokens, const Source& source, const Sink& sink) {
  constexpr int64_t stride = Tile<channels>::tokens;
  const int64_t vectors = (tokens + kWidth - 1) / kWidth;
  const Cut cut(vectors, Tile<channels>::vectors, layout.units(), at::get_num_threads());
  at::parallel_for(0, cut.panels * cut.chunks, 1, [&](int64_t begin, int64_t end) {
    static thread_local Scratch panel_memory, sums_memory;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t chunk = task / cut.panels, p = task % cut.panels;
      const int64_t v0 = vectors * p / cut.panels, v1 = vectors * (p + 1) / cut.panels;
      const int64_t token0 = v0 * kWidth, token1 = std::min(tokens, v1 * kWidth);
      const int64_t unit0 = layout.units() * chunk / cut.chunks, unit1 = layout.units() * (chunk + 1) / cut.chunks;
      const int64_t channel0 = unit0 * kUnit, channel1 = std::min(layout.out, unit1 * kUnit);
      // One register more: convolutions store whole registers past the last run of tokens.
      float* panel = panel_memory.get(kPanelBytes / static_cast<int64_t>(sizeof(float)) + kWidth);
      float* sums = sums_memory.get((channel1 - channel0 + 1) * stride);
      const Multiply multiply = multiply_for<channels, pairs>(v1 - v0);
      const auto cursor = source.cursor(token0, token1);
      for (int64_t block = 0; block < layout.blocks; ++block) {
        cursor.fill(panel, stride, layout.first(block) * layout.m, layout.first(block + 1) * layout.m);
        // Pairs name their channels within a unit; other groups stand in order.
        for (int64_t unit = unit0; unit < unit1; ++unit) {
          const int64_t group0 = unit * layout.groups_per_unit();
          const int64_t group1 = std::min(layout.groups(), (unit + 1) * layout.groups_per_unit());
          multiply({values + layout.values_at(block, group0), index + layout.index_at(block, group0), layout.kept(block),
                    group1 - group0, reinterpret_cast<const char*>(panel), sums + (unit - unit0) * kUnit * stride,
                    block == 0 ? bias + unit * kUnit : nullptr});
        }
      }
      if (activation != kNone) {
        for (int64_t c = 0; c < channel1 - channel0; ++c) activate(sums + c * stride, token1 - token0, activation);
      }
      sink(Sums{sums, stride, channel0, channel1, token0, token1});
    }
  });
}

template <class Source, class Sink>
void run(const Layout& layout, const float* values, const int16_t* index, const float* bias, Activation activation,
         int64_t tokens, const Source& source, const Sink& sink) {
  const auto go = [&](auto kernel) { kernel(layout, values, index, bias, activation, tokens, source, sink); };
  if (layout.pairs()) {
    go(run<2, true, Source, Sink>);
  } else if (layout.together == 2) {
    go(run<2, false, Source, Sink>);
  } else {
    go(run<4, false, Source, Sink>);
  }
}

}  // namespace sparsedm
