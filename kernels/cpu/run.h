// The driver: cuts a layer into panels of tokens x runs of output channels, and gives them to threads.
#pragma once

#include <ATen/Parallel.h>

#include <memory>
#include <vector>

#include "epilogue.h"
#include "product.h"

namespace sparsedm {

// Sums of so many output channels lie in the L2 cache while the blocks of K pass by. Panels are filled once per chunk, so
// chunks are large; beyond this, sums fall out of a 1 MB cache between blocks.
constexpr int64_t kSumBytes = 256 * 1024;
// Weights beyond this come from memory each time, so that several panels take turns on each stretch of them: 1.15x at 2:4v4
// for 1280 channels 3x3 (29 MB), where smaller weights lose 2 to 5 %.
constexpr int64_t kCachedWeightBytes = 8 * 1024 * 1024;
constexpr int64_t kMostBatch = 4;

// A buffer that a thread keeps: allocating 200 KB anew for each panel would fault its pages in each time.
class Scratch {
 public:
  template <class T>
  T* get(int64_t elements) {
    const size_t bytes = (elements * sizeof(T) + 63) / 64 * 64;
    if (bytes > size_) {
      data_.reset(std::aligned_alloc(64, bytes));
      TORCH_CHECK(data_ != nullptr, "out of memory: ", bytes, " bytes for a panel");
      std::memset(data_.get(), 0, bytes);  // lanes past the last token are computed, never used
      size_ = bytes;
    }
    return static_cast<T*>(data_.get());
  }

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<void, Free> data_;
  size_t size_ = 0;
};

// How the work is cut: panels x chunks, both as even as can be. Panels of a batch meet each stretch of weights together.
struct Cut {
  int64_t panels, chunks, batch;

  // `units` of channels, each with `parts` of them computed together.
  template <class Tile>
  Cut(int64_t registers, Tile, int64_t units, int64_t parts, int64_t weight_bytes, int64_t threads) {
    const int64_t most_units = kSumBytes / (kUnit * Tile::tokens * static_cast<int64_t>(sizeof(float)) * parts);
    panels = (registers + Tile::registers - 1) / Tile::registers;
    chunks = (units + most_units - 1) / most_units;
    batch = 1;
    if (panels * chunks % threads != 0 && panels * chunks < 16 * threads) {
      // Uneven over the threads: cut the channels finer (a panel is then filled more often, which is cheap), or where there
      // are too few channels, the tokens.
      const int64_t finer = (chunks + threads - 1) / threads * threads;
      if (finer <= units) {
        chunks = finer;
      } else {
        panels = std::min(registers, (panels + threads - 1) / threads * threads);
      }
    }
    if (weight_bytes > kCachedWeightBytes) {
      batch = std::min(panels, kMostBatch);
      while (batch > 1 && (panels + batch - 1) / batch * chunks % threads != 0) --batch;
    }
  }
};

// One thread's buffers.
struct Workspace {
  Scratch panels, sums;
};

template <int channels, bool pairs, class T, class Source, class Sink>
void run(const Layout& layout, const T* values, const int16_t* index, const float* bias, Activation activation,
         int64_t tokens, const Source& source, const Sink& sink) {
  using Panel = typename PanelOf<T>::type;
  using Size = Tile<channels, Panel>;
  constexpr int64_t stride = Size::tokens;
  // One register more: convolutions store whole registers past the last run of tokens.
  constexpr int64_t panel_size = (kPanelBytes + 64) / static_cast<int64_t>(sizeof(Panel));
  const int64_t registers = (tokens + Size::width - 1) / Size::width;
  // A gate stands half of all channels behind its value; the two units meet in one task.
  const int64_t parts = activation == kGeglu ? 2 : 1, units = layout.units() / parts;
  const Cut cut(registers, Size{}, units, parts, layout.values_size() * sizeof(T), at::get_num_threads());
  const int64_t batches = (cut.panels + cut.batch - 1) / cut.batch;
  at::parallel_for(0, batches * cut.chunks, 1, [&](int64_t begin, int64_t end) {
    static thread_local Workspace memory;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t chunk = task / batches, which = task % batches;
      const int64_t panel0 = cut.panels * which / batches, panel1 = cut.panels * (which + 1) / batches;
      const int64_t unit0 = units * chunk / cut.chunks, unit1 = units * (chunk + 1) / cut.chunks;
      const int64_t sums_size = ((std::min(layout.out, unit1 * kUnit) - unit0 * kUnit) * parts + 1) * stride;
      Panel* panels = memory.panels.get<Panel>((panel1 - panel0) * panel_size);
      float* sums = memory.sums.get<float>((panel1 - panel0) * sums_size);
      const auto first = [&](int64_t p) { return registers * p / cut.panels; };
      std::vector<decltype(source.cursor(0, 1))> cursors;
      for (int64_t p = panel0; p < panel1; ++p)
        cursors.push_back(source.cursor(first(p) * Size::width, std::min(tokens, first(p + 1) * Size::width)));
      for (int64_t block = 0; block < layout.blocks; ++block) {
        for (int64_t p = 0; p < panel1 - panel0; ++p)
          cursors[p].fill(panels + p * panel_size, stride, layout.first(block) * layout.m,
                          layout.first(block + 1) * layout.m);
        // Pairs name their channels within a unit; other groups stand in order.
        for (int64_t at = unit0 * parts; at < unit1 * parts; ++at) {
          const int64_t part = at % parts, unit = at / parts + part * units;
          const int64_t group0 = unit * layout.groups_per_unit();
          const int64_t group1 = std::min(layout.groups(), (unit + 1) * layout.groups_per_unit());
          const int64_t channel0 = unit * kUnit, channel1 = std::min(layout.out, channel0 + kUnit);
          for (int64_t p = 0; p < panel1 - panel0; ++p) {
            const int64_t r0 = first(panel0 + p), r1 = first(panel0 + p + 1);
            float* unit_sums = sums + p * sums_size + (at - unit0 * parts) * kUnit * stride;
            multiply_for<T, channels, pairs>(r1 - r0)(
                {values + layout.values_at(block, group0), index + layout.index_at(block, group0), layout.slots(block),
                 group1 - group0, reinterpret_cast<const char*>(panels + p * panel_size), unit_sums,
                 block == 0 ? bias + channel0 : nullptr, block + 1 == layout.blocks});
            if (block + 1 < layout.blocks || part + 1 < parts) continue;
            // Finished sums leave while they are in the cache, and their stores drain beneath the next products.
            const int64_t token0 = r0 * Size::width, token1 = std::min(tokens, r1 * Size::width);
            const int64_t count = channel1 - channel0;
            if (activation == kGeglu) {
              float* value_sums = unit_sums - kUnit * stride;
              for (int64_t c = 0; c < count; ++c)
                apply_gates(value_sums + c * stride, unit_sums + c * stride, token1 - token0);
              sink(Sums{value_sums, stride, channel0 - units * kUnit, channel1 - units * kUnit, token0, token1});
              continue;
            }
            if (activation != kNone) {
              for (int64_t c = 0; c < count; ++c) activate(unit_sums + c * stride, token1 - token0, activation);
            }
            sink(Sums{unit_sums, stride, channel0, channel1, token0, token1});
          }
        }
      }
    }
  });
}

template <class T, class Source, class Sink>
void run(const Layout& layout, const T* values, const int16_t* index, const float* bias, Activation activation,
         int64_t tokens, const Source& source, const Sink& sink) {
  const auto go = [&](auto kernel) { kernel(layout, values, index, bias, activation, tokens, source, sink); };
  if (layout.pairs()) {
    go(run<2, true, T, Source, Sink>);
  } else if (layout.together == 2) {
    go(run<2, false, T, Source, Sink>);
  } else {
    go(run<4, false, T, Source, Sink>);
  }
}

}  // namespace sparsedm
