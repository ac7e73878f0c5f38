// The family that any CPU can run and that the others are tested against: it states the order of every rounding.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "family.h"
#include "half.h"
#include "plain_loops.h"

namespace claq {
namespace {

bool always() { return true; }

bool prepare_row(const LayerView& layer, const float* x, Activations& activations, int64_t row, bool quantize) {
  float* scaled = activations.scaled ? activations.scaled + row * activations.stride : nullptr;
  const PackedPlace place = packed_place(layer, activations, row);
  bool exact = false;
  for (int s = 0; s < layer.segment_count; ++s) {
    const Segment& segment = layer.segments[s];
    for (int64_t b = segment.first_block; b < segment.first_block + segment.blocks; ++b) {
      float values[kBlock];
      float largest = 0;
      bool special = false;
      for (int i = 0; i < kBlock; ++i) {
        const int64_t p = b * kBlock + i;
        values[i] = layer.gather[p] < 0 ? 0.0f : layer.scale[p] * x[layer.gather[p]];
        special |= !std::isfinite(values[i]);
        largest = std::max(largest, std::fabs(values[i]));
      }
      if (scaled) std::memcpy(scaled + b * kBlock, values, sizeof values);
      special |= largest != 0 && largest < kSmallestMagnitude;
      exact |= special;
      if (!quantize) continue;
      const bool zero = special || largest == 0;
      const float inverse = 127.0f / largest;
      int32_t sum = 0;
      for (int position = 0; position < kBlock; ++position) {
        const float value = values[column_of_position(segment.width, position)];
        const auto rounded = static_cast<int8_t>(zero ? 0 : std::lrint(value * inverse));
        place.quantized[(b * kGroupsPerBlock + position / 4) * 4 * place.rows + position % 4] = rounded;
        sum += rounded;
      }
      place.scale[b * place.rows] = zero ? 0.0f : largest / 127.0f;
      place.correction[b * place.rows] = -128 * sum;
    }
  }
  return !exact;
}

// The code of a position within a block, whose words for one output are `stride` apart.
inline uint32_t code_at(const uint32_t* words, int64_t stride, int width, int position) {
  const int group = position / 4, shift = 8 * (position % 4);
  if (width == 4) return (words[(group / 2) * stride] >> (shift + 4 * (group % 2))) & 15u;
  const uint32_t low = (words[(group / 4) * stride] >> (shift + 2 * (group % 4))) & 3u;
  if (width == 2) return low;
  return low | ((words[2 * stride] >> column_of_position(3, position) & 1u) << 2);
}

// Calls use(block, centroids + 128 of its 32 positions) for every block of output row n.
template <class Use>
void for_each_block(const LayerView& layer, int64_t n, Use use) {
  uint8_t decoded[kBlock];
  for (int s = 0; s < layer.segment_count; ++s) {
    const Segment& segment = layer.segments[s];
    for (int64_t b = 0; b < segment.blocks; ++b) {
      const uint32_t* words = layer.codes + (segment.first_row + b * segment.width) * layer.out_features + n;
      const uint8_t* table = layer.table + segment.table_offset + ((b * kBlock) << segment.width);
      for (int position = 0; position < kBlock; ++position) {
        decoded[position] = table[(position << segment.width) + code_at(words, layer.out_features, segment.width, position)];
      }
      use(segment.first_block + b, segment.width, decoded);
    }
  }
}

void sums_int8(const LayerView& layer, const Activations& activations, int64_t m0, int64_t m1, int64_t n0, int64_t n1,
               float* sums, int64_t stride, void*) {
  for (int64_t n = n0; n < n1; ++n) {
    for (int64_t m = m0; m < m1; ++m) sums[(m - m0) * stride + n - n0] = 0;
    for_each_block(layer, n, [&](int64_t block, int, const uint8_t* decoded) {
      for (int64_t m = m0; m < m1; ++m) {
        const PackedPlace place = packed_place(layer, activations, m);
        const int8_t* quantized = place.quantized + block * kBlock * place.rows;
        int32_t dot = place.correction[block * place.rows];
        for (int i = 0; i < kBlock; ++i) dot += decoded[i] * quantized[i / 4 * 4 * place.rows + i % 4];
        float& sum = sums[(m - m0) * stride + n - n0];
        sum = std::fma(static_cast<float>(dot), place.scale[block * place.rows], sum);
      }
    });
  }
}

void sums_float(const LayerView& layer, const Activations& activations, int64_t m0, int64_t m1, int64_t n0, int64_t n1,
                float* sums, int64_t stride, void*) {
  for (int64_t n = n0; n < n1; ++n) {
    for (int64_t m = m0; m < m1; ++m) sums[(m - m0) * stride + n - n0] = 0;
    for_each_block(layer, n, [&](int64_t block, int width, const uint8_t* decoded) {
      float centroid[kBlock];
      for (int i = 0; i < kBlock; ++i) centroid[column_of_position(width, i)] = static_cast<float>(decoded[i] - 128);
      for (int64_t m = m0; m < m1; ++m) {
        const float* scaled = activations.scaled + m * activations.stride + block * kBlock;
        float partial = 0;
        for (int i = 0; i < kBlock; ++i) partial += scaled[i] * centroid[i];
        sums[(m - m0) * stride + n - n0] += partial;
      }
    });
  }
}

void add_outliers(const LayerView& layer, const Activations& activations, int64_t m0, int64_t m1, int64_t n0, int64_t n1,
                  float* sums, int64_t stride) {
  const auto* narrow = static_cast<const uint16_t*>(layer.outlier_index);
  const auto* wide = static_cast<const int32_t*>(layer.outlier_index);
  for (int64_t n = n0; n < n1; ++n) {
    const int32_t begin = layer.outlier_ptr[n], end = layer.outlier_ptr[n + 1];
    if (begin == end) continue;
    for (int64_t m = m0; m < m1; ++m) {
      const float* scaled = activations.scaled + m * activations.stride;
      float lanes[kOutlierLanes] = {};
      for (int32_t i = begin; i < end; ++i) {
        const int64_t column = layer.wide_outlier_index ? wide[i] : narrow[i];
        float& lane = lanes[(i - begin) % kOutlierLanes];
        lane = std::fma(half_to_float(layer.outlier_value[i]), scaled[column], lane);
      }
      for (int width = kOutlierLanes / 2; width > 0; width /= 2) {
        for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
      }
      sums[(m - m0) * stride + n - n0] += lanes[0];
    }
  }
}

void finish_row(const LayerView& layer, int64_t n0, int64_t n1, const float* sums, float* y) {
  for (int64_t n = n0; n < n1; ++n) {
    y[n - n0] = layer.bias ? std::fma(layer.row_scale[n], sums[n - n0], layer.bias[n]) : layer.row_scale[n] * sums[n - n0];
  }
}

void half_row_to_float(const uint16_t* from, float* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = half_to_float(from[i]);
}

void float_row_to_half(const float* from, uint16_t* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = float_to_half(from[i]);
}

}  // namespace

const Family kPortable = {"portable", always, {1e9, 1e9}, {1e9, 1e9}, 1, 1, false, false, kCachedSums, prepare_row, nullptr, nullptr, sums_int8, sums_float,
                          add_outliers, finish_row, half_row_to_float, float_row_to_half, swiglu, add_parts};

}  // namespace claq
