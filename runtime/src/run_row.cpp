#include "run_row.h"

#include <algorithm>
#include <atomic>

#include "elements.h"
#include "family.h"
#include "workspace.h"

namespace claq {
namespace {

// Of more outputs (a vocabulary) the sums of all parts would take longer than what the parts save.
constexpr int64_t kMostOutputs = kLongestTile;
constexpr int64_t kMostParts = 4;
constexpr int64_t kPartWeights = 120 * 1000;  // about 2 µs, or 5 from memory, see kAwakeTaskSeconds
constexpr int64_t kStripeOutputs = 1024;      // of a part, where there are more threads than parts: the least
// On Zen each thread sums and finishes outputs of its own if it gets so many: what one core has summed takes the other long to read. Two
// threads took 0.82 to 0.93 of the time in layers of 1536 and more outputs, and 1.1 times as long with 576, whose code words then come
// in short runs.
constexpr int64_t kOwnOutputs = 512;
constexpr double kFinishedPerSecond = 1e9;    // rounded: outliers and partial sums, to decide into how many tasks to split

struct Slice {
  LayerView layer;
  Activations activations;
};

// Blocks [first, first + count) as a layer without outliers, with their part of the activations.
Slice slice(const Family& family, const LayerView& whole, const Activations& activations, int64_t first, int64_t count) {
  Slice part{whole, activations};
  LayerView& layer = part.layer;
  layer.columns = count * kBlock;
  layer.blocks = count;
  layer.segment_count = 0;
  for (int s = 0; s < whole.segment_count; ++s) {
    const Segment& segment = whole.segments[s];
    const Range blocks = overlap(segment, first, first + count);
    if (blocks.begin >= blocks.end) continue;
    const int64_t skipped = blocks.begin - segment.first_block;
    layer.segments[layer.segment_count++] = {segment.width, blocks.begin - first, blocks.end - blocks.begin,
                                             segment.first_row + skipped * segment.width,
                                             segment.table_offset + ((skipped * kBlock) << segment.width)};
  }
  const int64_t column = first * kBlock;
  layer.scale += column;
  layer.gather += column;
  layer.outlier_ptr = nullptr;
  layer.first_feature += column;
  if (activations.scaled) part.activations.scaled += column;
  if (activations.quantized) part.activations.quantized += column * family.activation_bytes;
  if (activations.block_scale) part.activations.block_scale += first;
  if (activations.block_correction) part.activations.block_correction += first;
  return part;
}

}  // namespace

int64_t column_parts(const LayerView& layer) {
  if (layer.out_features > kMostOutputs) return 1;
  const int64_t most = std::min({kMostParts, layer.blocks, layer.columns * layer.out_features / kPartWeights});
  int64_t parts = 1;
  while (2 * parts <= most) parts *= 2;
  return parts;
}

void run_row(const Family& family, const LayerView& layer, claq_dtype dtype, bool int8, const void* x, void* y, const Host& host) {
  const int64_t outputs = layer.out_features, parts = column_parts(layer);
  const int64_t tiles = (outputs + kNarrowestTile - 1) / kNarrowestTile, stride = tiles * kNarrowestTile;
  const int64_t converted = dtype == CLAQ_FLOAT32 ? 0 : layer.in_features;
  const int64_t scaled_columns = !int8 || layer.outlier_ptr ? layer.columns : 0;
  const int64_t quantized_bytes = int8 ? layer.columns * family.activation_bytes : 0, quantized_blocks = int8 ? layer.blocks : 0;
  Workspace workspace(Workspace::bytes_for<float>(converted) + Workspace::bytes_for<float>(scaled_columns) +
                      Workspace::bytes_for<int8_t>(quantized_bytes) + Workspace::bytes_for<float>(quantized_blocks) +
                      Workspace::bytes_for<int32_t>(quantized_blocks) + Workspace::bytes_for<float>(parts * stride));
  float* buffer = workspace.take<float>(converted);
  float* scaled = workspace.take<float>(scaled_columns);
  Activations activations{};
  activations.rows = 1;
  activations.alone = true;
  activations.stride = layer.columns;
  activations.scaled = scaled_columns ? scaled : nullptr;
  activations.line_rows = family.tile_rows;
  activations.quantized = int8 ? workspace.take<int8_t>(quantized_bytes) : nullptr;
  activations.block_scale = workspace.take<float>(quantized_blocks);
  activations.block_correction = workspace.take<int32_t>(quantized_blocks);
  float* sums = workspace.take<float>(parts * stride);

  const float* row = load_row(family, dtype, x, 0, layer.in_features, buffer);
  const int64_t most_stripes = std::max<int64_t>(1, outputs / kStripeOutputs);
  const int64_t wanted = task_count(host, product_seconds(family, layer, int8, 1), parts * most_stripes);
  const int64_t stripes = (wanted + parts - 1) / parts, units = parts * stripes, tasks = stripes > 1 ? units : wanted;
  std::atomic<bool> exact{false};
  const auto prepare = [&](const LayerView& columns, Activations& prepared) {
    if (!family.prepare_row(columns, row, prepared, 0, int8) && int8) exact = true;
  };
  const auto sum_part = [&](const Slice& some, int64_t part, Range n, const Workspace& scratch) {
    (int8 ? family.sums_int8 : family.sums_float)(some.layer, some.activations, 0, 1, n.begin, n.end, sums + part * stride + n.begin,
                                                  stride, scratch.first<void>());
  };
  const auto part_of = [&](int64_t part) {
    const int64_t first = layer.blocks * part / parts, end = layer.blocks * (part + 1) / parts;
    return slice(family, layer, activations, first, end - first);
  };
  const auto finish = [&](Range n) {
    const int64_t n0 = n.begin, n1 = n.end;
    family.add_parts(sums + n0, stride, parts, n1 - n0);
    if (layer.outlier_ptr) family.add_outliers(layer, activations, 0, 1, n0, n1, sums + n0, stride);
    float* finished = dtype == CLAQ_FLOAT32 ? static_cast<float*>(y) + n0 : sums + stride + n0;  // the second part's are used up
    family.finish_row(layer, n0, n1, sums + n0, finished);
    if (dtype != CLAQ_FLOAT32) store_row(family, dtype, finished, n1 - n0, y, n0);
  };
  // The i-th of `count` stripes of whole tiles.
  const auto outputs_of = [&](int64_t i, int64_t count) {
    return Range{tiles * i / count * kNarrowestTile, std::min(outputs, tiles * (i + 1) / count * kNarrowestTile)};
  };

  const bool own_outputs = family.short_runs && layer.tuning == Tuning::kZen && wanted > 1 && outputs >= wanted * kOwnOutputs;
  if (own_outputs || stripes > 1) prepare(layer, activations);  // else each part's task does, and has them in its cache
  if (own_outputs && !exact) {
    return for_each(host, wanted, [&](int64_t task) {
      const Workspace scratch(static_cast<size_t>(kScratchBytes));
      const Range own = outputs_of(task, wanted);
      for (int64_t part = 0; part < parts; ++part) sum_part(part_of(part), part, own, scratch);
      finish(own);
    });
  }
  if (!exact) {
    for_each(host, tasks, [&](int64_t task) {
      const Workspace scratch(static_cast<size_t>(kScratchBytes));
      for (int64_t unit = units * task / tasks; unit < units * (task + 1) / tasks; ++unit) {
        const int64_t part = unit / stripes, stripe = unit % stripes;
        Slice some = part_of(part);
        if (stripes == 1) prepare(some.layer, some.activations);
        sum_part(some, part, outputs_of(stripe, stripes), scratch);
      }
    });
  }
  if (exact) return run_row(family, layer, dtype, false, x, y, host);

  const int64_t outliers = layer.outlier_ptr ? layer.outlier_ptr[outputs] : 0;
  const int64_t ends = task_count(host, static_cast<double>(outliers + parts * outputs / 8) / kFinishedPerSecond, tiles);
  for_each(host, ends, [&](int64_t task) { finish(outputs_of(task, ends)); });
}

}  // namespace claq
