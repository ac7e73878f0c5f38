// Outliers for the AVX2 families.
#pragma once

#include "avx2_common.h"
#include "sliced_outliers.h"

namespace claq {
namespace {

// ---- one row of x

CLAQ_INLINE __m256 eight_values(const uint16_t* values) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values)));
}

// Loads and insertions take half the time of a gather instruction on Zen 3.
template <class Index>
CLAQ_INLINE __m256 load_eight(const float* from, const Index* at) {
  __m128 low = _mm_load_ss(from + at[0]), high = _mm_load_ss(from + at[4]);
  low = _mm_insert_ps(low, _mm_load_ss(from + at[1]), 0x10);
  high = _mm_insert_ps(high, _mm_load_ss(from + at[5]), 0x10);
  low = _mm_insert_ps(low, _mm_load_ss(from + at[2]), 0x20);
  high = _mm_insert_ps(high, _mm_load_ss(from + at[6]), 0x20);
  low = _mm_insert_ps(low, _mm_load_ss(from + at[3]), 0x30);
  high = _mm_insert_ps(high, _mm_load_ss(from + at[7]), 0x30);
  return _mm256_set_m128(high, low);
}

// One output, as the format has it.
template <class Index>
inline float row_of_output(const Index* columns, const uint16_t* values, int64_t count, const float* scaled) {
  __m256 sums = _mm256_setzero_ps();
  int64_t i = 0;
  for (; i + kOutlierLanes <= count; i += kOutlierLanes) {
    sums = _mm256_fmadd_ps(eight_values(values + i), load_eight(scaled, columns + i), sums);
  }
  alignas(32) float lanes[kOutlierLanes];
  _mm256_store_ps(lanes, sums);
  for (; i < count; ++i) {
    float& lane = lanes[i % kOutlierLanes];
    lane = __builtin_fmaf(half_to_single(values[i]), scaled[columns[i]], lane);
  }
  return sum_of_lanes(lanes, [](float a, float b) CLAQ_STEP { return a + b; });
}

// What the sixteen outputs of a slice come to, eight at a time.
template <class Index>
CLAQ_INLINE void row_of_slice(const OutlierSlice& slice, const OutlierSlices& slices, const int32_t* count, const float* scaled, float* to) {
  const Index* index = static_cast<const Index*>(slices.index) + slice.first;
  const uint16_t* values = slices.value + slice.first;
  unrolled<2>([&](auto half) CLAQ_STEP {
    constexpr int kFirst = 8 * decltype(half)::kValue;
    const __m256i counts = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(count + kFirst));
    __m256 lanes[kOutlierLanes];
    unrolled<kOutlierLanes>([&](auto lane) CLAQ_STEP { lanes[lane.kValue] = _mm256_setzero_ps(); });
    for_entries(slice.steps, [&](int64_t j, auto lane) CLAQ_STEP {
      const int64_t at = j * kSliceOutputs;
      if constexpr (kFirst == 0) fetch_slice_ahead<decltype(lane)::kValue>(index + at, values + at);
      // A slot that has no entry j has a value of 0 there, and what it is multiplied by may be infinite.
      const __m256i present = _mm256_cmpgt_epi32(counts, _mm256_set1_epi32(static_cast<int32_t>(j)));
      const __m256 x = _mm256_and_ps(_mm256_castsi256_ps(present), load_eight(scaled, index + at + kFirst));
      lanes[lane.kValue] = _mm256_fmadd_ps(eight_values(values + at + kFirst), x, lanes[lane.kValue]);
    });
    _mm256_store_ps(to + kFirst, sum_of_lanes(lanes, Line<8>::add));
  });
}

template <class Index>
inline void add_outliers_of_row(const LayerView& layer, const float* scaled, int64_t n0, int64_t n1, float* sums) {
  const OutlierSlices& slices = *layer.outlier_slices;
  alignas(32) float of_slots[kNarrowestTile];
  for (int64_t n = n0; n < n1; n += kNarrowestTile) {
    for (int64_t s = 0; s < kNarrowestTile; s += kSliceOutputs) {
      const OutlierSlice& slice = slices.slices[(n + s) / kSliceOutputs];
      if (slice.steps != kAsRows) {
        row_of_slice<Index>(slice, slices, slices.count + n + s, scaled, of_slots + s);
        continue;
      }
      for (int64_t i = s; i < s + kSliceOutputs; ++i) {
        const int64_t entry = slices.count[n + i] ? layer.outlier_ptr[n + slices.output[n + i]] : 0;
        of_slots[i] = row_of_output(static_cast<const Index*>(layer.outlier_index) + entry, layer.outlier_value + entry, slices.count[n + i],
                                    scaled);
      }
    }
    const int64_t count = n1 - n < kNarrowestTile ? n1 - n : kNarrowestTile;
    for (int64_t i = 0; i < count; ++i) sums[n - n0 + i] += of_slots[slices.slot[n + i]];
  }
}

// ---- more rows: a line of a column has 4 or 8 of them

// Rows [m, last) of x, which are rows of the tile that begins at row `first`.
template <bool kFinite, int kRows, class Index>
inline void add_outliers_of_tile(const LayerView& layer, const float* transposed, int64_t first, int64_t m, int64_t last, int64_t n0,
                                 int64_t n1, float* sums, int64_t stride) {
  using L = Line<kRows>;
  const OutlierSlices& slices = *layer.outlier_slices;
  alignas(32) float lines[kRows * kNarrowestTile];  // a line for each slot
  for (int64_t n = n0; n < n1; n += kNarrowestTile) {
    for (int64_t s = 0; s < kNarrowestTile; s += kSliceOutputs) {
      const OutlierSlice& slice = slices.slices[(n + s) / kSliceOutputs];
      const int32_t* count = slices.count + n + s;
      float* to = lines + s * kRows;
      if (slice.steps != kAsRows) {
        const Index* index = static_cast<const Index*>(slices.index) + slice.first;
        const uint16_t* values = slices.value + slice.first;
        if (m == 0) fetch_entries(index, values, slice.steps * kSliceOutputs);  // later rows find them in a cache
        lines_of_slice<kFinite, kRows, 1>(slice, index, values, count, transposed, 0, to, 0);
        continue;
      }
      for (int64_t i = 0; i < kSliceOutputs; ++i) {
        const int64_t entry = count[i] ? layer.outlier_ptr[n + slices.output[n + s + i]] : 0;
        const auto value = [&](int64_t k) CLAQ_STEP { return half_to_single(layer.outlier_value[entry + k]); };
        lines_of_output<kRows, 1, 1>(static_cast<const Index*>(layer.outlier_index) + entry, count[i], value, transposed, 0, to + i * kRows, 0);
      }
    }
    const uint8_t* slot = slices.slot + n;
    const int64_t count = n1 - n < kNarrowestTile ? n1 - n : kNarrowestTile;
    for (int64_t i = 0; i < count; i += kRows) {
      typename L::Type results[kRows];
      unrolled<kRows>([&](auto j) CLAQ_STEP { results[j.kValue] = L::load(lines + slot[i + j.kValue] * kRows); });
      transpose_lines(results);
      for (int r = 0; r < kRows; ++r) {
        const int64_t row = first + r;
        if (row >= m && row < last) L::add_to(sums + (row - m) * stride + n - n0 + i, results[r]);
      }
    }
  }
}

template <class Index>
inline void add_outliers_with(const LayerView& layer, const Activations& activations, int64_t m0, int64_t m1, int64_t n0, int64_t n1,
                              float* sums, int64_t stride) {
  if (!activations.transposed) {
    for (int64_t m = m0; m < m1; ++m) {
      add_outliers_of_row<Index>(layer, activations.scaled + m * activations.stride, n0, n1, sums + (m - m0) * stride);
    }
    return;
  }
  const int64_t rows = activations.line_rows;
  const auto finite = rows == 4 ? add_outliers_of_tile<true, 4, Index> : add_outliers_of_tile<true, 8, Index>;
  const auto any = rows == 4 ? add_outliers_of_tile<false, 4, Index> : add_outliers_of_tile<false, 8, Index>;
  for (int64_t m = m0; m < m1;) {
    const int64_t first = m / rows * rows, last = first + rows < m1 ? first + rows : m1;
    (activations.quantized ? finite : any)(layer, activations.transposed + first * layer.columns, first, m, last, n0, n1,
                                           sums + (m - m0) * stride, stride);
    m = last;
  }
}

inline void add_outliers(const LayerView& layer, const Activations& activations, int64_t m0, int64_t m1, int64_t n0, int64_t n1,
                         float* sums, int64_t stride) {
  const auto add = layer.wide_outlier_index ? add_outliers_with<int32_t> : add_outliers_with<uint16_t>;
  add(layer, activations, m0, m1, n0, n1, sums, stride);
}

}  // namespace
}  // namespace claq
