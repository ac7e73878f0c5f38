// Outliers for the AVX2 families.
#pragma once

#include "avx2_common.h"
#include "sliced_outliers.h"

namespace claq {
namespace {

// ---- one row of x

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
  add_slices_of_row<Index>(
      layer, scaled, n0, n1, sums,
      [&](const OutlierSlice& slice, const int32_t* count, float* to) CLAQ_STEP {
        row_of_slice<Index>(slice, *layer.outlier_slices, count, scaled, to);
      },
      [](const float* of_slots, const uint8_t* slot, int64_t count, float* to) CLAQ_STEP {
        for (int64_t i = 0; i < count; ++i) to[i] += of_slots[slot[i]];
      });
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
      float* to = lines + s * kRows;
      if (slice.steps == kAsRows) {
        lines_of_rows<kRows, 1, Index>(layer, n, s, transposed, 0, to, 0);
        continue;
      }
      const Index* index = static_cast<const Index*>(slices.index) + slice.first;
      const uint16_t* values = slices.value + slice.first;
      if (m == 0) fetch_entries(index, values, slice.steps * kSliceOutputs);  // later rows find them in a cache
      lines_of_slice<kFinite, kRows, 1>(slice, index, values, slices.count + n + s, transposed, 0, to, 0);
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
