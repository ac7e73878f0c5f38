#include "gather.h"

#include <algorithm>
#include <string>
#include <vector>

#include "elements.h"
#include "family.h"
#include "half.h"
#include "layer.h"
#include "parallel.h"
#include "workspace.h"

namespace claq {
namespace {

constexpr double kGatheredPerSecond = 0.7e9;  // weights; a rounded estimate

// Where a column of a block stands in LayerView::table: the inverse of column_of_position.
struct Positions {
  uint8_t of_column[5][kBlock];
  constexpr Positions() : of_column{} {
    for (int width = 2; width <= 4; ++width) {
      for (int position = 0; position < kBlock; ++position) {
        of_column[width][column_of_position(width, position)] = static_cast<uint8_t>(position);
      }
    }
  }
};
constexpr Positions kPositions;

template <int kWidth>
void unpack(const uint32_t* words, int64_t stride, uint8_t* codes) {
  constexpr int kLow = kWidth == 4 ? 4 : 2;
  constexpr int kPerWord = 32 / kLow;
  for (int word = 0; word < kBlock / kPerWord; ++word) {
    const uint32_t packed = words[word * stride];
    for (int i = 0; i < kPerWord; ++i) {
      codes[word * kPerWord + i] = static_cast<uint8_t>((packed >> (kLow * i)) & ((1u << kLow) - 1));
    }
  }
  if (kWidth == 3) {
    const uint32_t third = words[2 * stride];
    for (int i = 0; i < kBlock; ++i) codes[i] = static_cast<uint8_t>(codes[i] | (((third >> i) & 1u) << 2));
  }
}

// Centroids of row n for the stored columns of a segment.
template <int kWidth>
void decode(const LayerView& layer, const Segment& segment, int64_t n, float* values) {
  const int64_t stride = layer.out_features;
  uint8_t codes[kBlock];
  for (int64_t b = 0; b < segment.blocks; ++b) {
    unpack<kWidth>(layer.codes + (segment.first_row + b * kWidth) * stride + n, stride, codes);
    const uint8_t* table = layer.table + segment.table_offset + (b * kBlock << kWidth);
    float* to = values + (segment.first_block + b) * kBlock;
    for (int i = 0; i < kBlock; ++i) {
      const int entry = table[(kPositions.of_column[kWidth][i] << kWidth) + codes[i]];
      to[i] = static_cast<float>(entry - 128);
    }
  }
}

void decode_row(const LayerView& layer, int64_t n, float* values) {
  for (int s = 0; s < layer.segment_count; ++s) {
    const Segment& segment = layer.segments[s];
    switch (segment.width) {
      case 4: decode<4>(layer, segment, n, values); break;
      case 3: decode<3>(layer, segment, n, values); break;
      default: decode<2>(layer, segment, n, values);
    }
  }
  if (layer.outlier_ptr) {
    for (int64_t i = layer.outlier_ptr[n]; i < layer.outlier_ptr[n + 1]; ++i) {
      const int64_t column = layer.wide_outlier_index ? static_cast<const int32_t*>(layer.outlier_index)[i]
                                                      : static_cast<const uint16_t*>(layer.outlier_index)[i];
      values[column] += half_to_float(layer.outlier_value[i]);
    }
  }
  const float row_scale = layer.row_scale[n];
  for (int64_t p = 0; p < layer.columns; ++p) values[p] = values[p] * layer.scale[p] * row_scale;
}

// Code words of a row lie as far apart as there are rows: nothing but this brings the next row's in ahead of time.
void prefetch_row(const LayerView& layer, int64_t n) {
  int64_t rows = 0;
  for (int s = 0; s < layer.segment_count; ++s) rows += layer.segments[s].blocks * layer.segments[s].width;
  for (int64_t r = 0; r < rows; ++r) __builtin_prefetch(layer.codes + r * layer.out_features + n);
}

std::vector<int64_t> row_numbers(claq_dtype dtype, const void* indices, int64_t count, int64_t rows) {
  std::vector<int64_t> numbers(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) {
    const int64_t index = dtype == CLAQ_INT64 ? static_cast<const int64_t*>(indices)[i] : static_cast<const int32_t*>(indices)[i];
    if (index < -rows || index >= rows) {
      throw InvalidArgument("indices: element " + std::to_string(i) + " is " + std::to_string(index) + ", expected " +
                            std::to_string(-rows) + " to " + std::to_string(rows - 1));
    }
    numbers[static_cast<size_t>(i)] = index < 0 ? index + rows : index;
  }
  return numbers;
}

}  // namespace

void gather(const claq_layer& handle, claq_dtype index_dtype, const void* indices, int64_t count, claq_dtype dtype, void* y,
            claq_parallel_for parallel_for, void* context) {
  if (dtype != CLAQ_FLOAT32 && dtype != CLAQ_FLOAT16 && dtype != CLAQ_BFLOAT16) {
    throw InvalidArgument("y: expected float32, float16 or bfloat16");
  }
  if (index_dtype != CLAQ_INT32 && index_dtype != CLAQ_INT64) throw InvalidArgument("indices: expected int32 or int64");
  if (count < 0) throw InvalidArgument("indices: negative number of elements");
  if (count == 0) return;
  if (!indices || !y) throw InvalidArgument("indices and y: expected data");

  const LayerView& layer = handle.view;
  const Host host{parallel_for, context};
  const std::vector<int64_t> rows = row_numbers(index_dtype, indices, count, layer.out_features);
  const int64_t tasks = task_count(host, static_cast<double>(count * layer.columns) / kGatheredPerSecond, count);
  for_each(host, tasks, [&](int64_t task) {
    Workspace workspace(Workspace::bytes_for<float>(layer.columns) + Workspace::bytes_for<float>(layer.in_features));
    float* stored = workspace.take<float>(layer.columns);
    float* buffer = workspace.take<float>(layer.in_features);
    const int64_t end = count * (task + 1) / tasks;
    for (int64_t i = count * task / tasks; i < end; ++i) {
      if (i + 1 < end) prefetch_row(layer, rows[static_cast<size_t>(i + 1)]);
      decode_row(layer, rows[static_cast<size_t>(i)], stored);
      const int64_t offset = i * layer.in_features;
      float* row = dtype == CLAQ_FLOAT32 ? static_cast<float*>(y) + offset : buffer;
      if (layer.identity_order) {
        std::copy(stored, stored + layer.in_features, row);
      } else {
        for (int64_t p = 0; p < layer.columns; ++p) {
          if (layer.gather[p] >= 0) row[layer.gather[p]] = stored[p];
        }
      }
      if (dtype != CLAQ_FLOAT32) store_row(*handle.family, dtype, row, layer.in_features, y, offset);
    }
  });
}

}  // namespace claq
