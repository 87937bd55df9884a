// The driver: cuts a layer into panels of tokens x runs of output channels, and gives them to threads.
#pragma once

#include <ATen/Parallel.h>

#include <numeric>
#include <vector>

#include "activation.h"
#include "epilogue.h"
#include "product.h"
#include "scratch.h"
#include "source.h"

namespace sparsedm {

// Sums of so many output channels lie in the L2 cache while the blocks of K pass by. Panels are filled once per chunk, so
// chunks are large; beyond this, sums fall out of a 1 MB cache between blocks.
constexpr int64_t kSumBytes = 256 * 1024;
// Weights beyond this come from memory each time, so that several panels take turns on each stretch of them: 1.15x at 2:4v4
// for 1280 channels 3x3 (29 MB), where smaller weights lose 2 to 5 %. Where taps share rows, and panels are smaller, it pays
// from half of that on: 3 to 4 % for 640 -> 640 and 1280 -> 320 (7 MB).
constexpr int64_t kCachedWeightBytes = 8 * 1024 * 1024;
constexpr int64_t kMostBatch = 4;

// How the work is cut: panels x chunks, both as even as can be. Panels of a batch meet each stretch of weights together.
struct Cut {
  Grid grid;
  int64_t per_column, panels, chunks, batch;

  // `units` of channels, each with `parts` of them computed together.
  template <class Tile>
  Cut(const Grid& grid_, Tile, int64_t units, int64_t parts, bool from_memory, int64_t threads) : grid(grid_) {
    const int64_t most_units = kSumBytes / (kUnit * Tile::tokens * static_cast<int64_t>(sizeof(float)) * parts);
    per_column = (grid.rows + Tile::registers - 1) / Tile::registers;
    panels = grid.columns * per_column;
    chunks = (units + most_units - 1) / most_units;
    batch = 1;
    if (panels * chunks % threads != 0 && panels * chunks < 16 * threads) {
      // Uneven over the threads: cut the channels finer (a panel is then filled more often, which is cheap), or where there
      // are too few channels, the tokens.
      const int64_t finer = (chunks + threads - 1) / threads * threads;
      if (finer <= units) {
        chunks = finer;
      } else {
        const int64_t even = threads / std::gcd(threads, grid.columns);
        per_column = std::min(grid.rows, (per_column + even - 1) / even * even);
        panels = grid.columns * per_column;
      }
    }
    if (from_memory) {
      batch = std::min(panels, kMostBatch);
      while (batch > 1 && (panels + batch - 1) / batch * chunks % threads != 0) --batch;
    }
  }

  // Neighbours in a row of the image follow each other: they share cache lines of input and output.
  int64_t column(int64_t panel) const { return panel % grid.columns; }
  int64_t first(int64_t panel) const { return grid.rows * (panel / grid.columns) / per_column; }
  int64_t last(int64_t panel) const { return grid.rows * (panel / grid.columns + 1) / per_column; }
};

// One thread's buffers.
struct Workspace {
  Scratch panels, sums;
};

template <int channels, bool pairs, class T, class Source, class Sink>
void run(const Layout& layout, const T* values, const int16_t* index, const float* bias, Activation activation,
         const Source& source, const Sink& sink) {
  using Panel = typename PanelOf<T>::type;
  using Size = Tile<channels, Panel>;
  constexpr int64_t stride = Size::tokens;
  // One register more: convolutions store whole registers past the last run of tokens.
  constexpr int64_t panel_size = (kPanelBytes + 64) / static_cast<int64_t>(sizeof(Panel));
  // A gate stands half of all channels behind its value; the two units meet in one task.
  const int64_t parts = activation == kGeglu ? 2 : 1, units = layout.units() / parts;
  const bool from_memory = layout.values_size() * static_cast<int64_t>(sizeof(T)) * (layout.shares_rows() ? 2 : 1) > kCachedWeightBytes;
  const Cut cut(source.grid(layout, Size::width), Size{}, units, parts, from_memory, at::get_num_threads());
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
      std::vector<typename Source::Cursor> cursors;
      for (int64_t p = panel0; p < panel1; ++p)
        cursors.push_back(source.cursor(layout, Size::width, cut.column(p), cut.first(p), cut.last(p)));
      for (int64_t block = 0; block < layout.blocks; ++block) {
        for (int64_t p = 0; p < panel1 - panel0; ++p)
          cursors[p].fill(panels + p * panel_size, layout, block);
        // Pairs name their channels within a unit; other groups stand in order.
        for (int64_t at = unit0 * parts; at < unit1 * parts; ++at) {
          const int64_t part = at % parts, unit = at / parts + part * units;
          const int64_t group0 = unit * layout.groups_per_unit();
          const int64_t group1 = std::min(layout.groups(), (unit + 1) * layout.groups_per_unit());
          const int64_t channel0 = unit * kUnit, channel1 = std::min(layout.out, channel0 + kUnit);
          for (int64_t p = 0; p < panel1 - panel0; ++p) {
            const int64_t registers = cut.last(panel0 + p) - cut.first(panel0 + p);
            float* unit_sums = sums + p * sums_size + (at - unit0 * parts) * kUnit * stride;
            multiply_for<T, channels, pairs>(registers)(
                {values + layout.values_at(block, group0), index + layout.index_at(block, group0), layout.slots(block),
                 group1 - group0, reinterpret_cast<const char*>(panels + p * panel_size), unit_sums,
                 block == 0 ? bias + channel0 : nullptr, block + 1 == layout.blocks});
            if (block + 1 < layout.blocks || part + 1 < parts) continue;
            // Finished sums leave while they are in the cache, and their stores drain beneath the next products.
            const int64_t count = channel1 - channel0, lanes = registers * Size::width;
            if (activation == kGeglu) {
              float* value_sums = unit_sums - kUnit * stride;
              for (int64_t c = 0; c < count; ++c) apply_gates(value_sums + c * stride, unit_sums + c * stride, lanes);
              for (const Run& run : cursors[p].runs())
                sink(Sums{value_sums + run.at, stride, channel0 - units * kUnit, channel1 - units * kUnit, run.token,
                          run.token + run.count});
              continue;
            }
            if (activation != kNone) {
              for (int64_t c = 0; c < count; ++c) activate(unit_sums + c * stride, lanes, activation);
            }
            for (const Run& run : cursors[p].runs())
              sink(Sums{unit_sums + run.at, stride, channel0, channel1, run.token, run.token + run.count});
          }
        }
      }
    }
  });
}

template <class T, class Source, class Sink>
void run(const Layout& layout, const T* values, const int16_t* index, const float* bias, Activation activation,
         const Source& source, const Sink& sink) {
  const auto go = [&](auto kernel) { kernel(layout, values, index, bias, activation, source, sink); };
  if (layout.pairs()) {
    go(run<2, true, T, Source, Sink>);
  } else if (layout.together == 2) {
    go(run<2, false, T, Source, Sink>);
  } else {
    go(run<4, false, T, Source, Sink>);
  }
}

}  // namespace sparsedm
