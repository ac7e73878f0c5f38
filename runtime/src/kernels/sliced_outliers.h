// What the AVX2 and AVX-512 families share of outliers in slices (LayerView::outlier_slices).
//
// Included only by files that are compiled for AVX2, FMA and F16C or more; see avx2_common.h.
#pragma once

#include "family.h"
#include "layout.h"
#include "lines.h"
#include "unrolled.h"

namespace claq {
namespace {

// Entry i of an output is summed in lane i % 8, and the lanes then by halves. Outputs come in the order of LayerView::outlier_slices: a loop
// over the entries of one is as long as the one before it, and is seldom mispredicted, and for one row of x sixteen outputs fill whole vectors.
// What is summed in that order is put into the order of the outputs a tile at a time.

// lanes[0] = the sum of kOutlierLanes lanes by halves.
template <class Type, class Add>
CLAQ_INLINE Type sum_of_lanes(Type (&lanes)[kOutlierLanes], Add add) {
  static_assert(kOutlierLanes == 8);
  unrolled<4>([&](auto j) CLAQ_STEP { lanes[j.kValue] = add(lanes[j.kValue], lanes[j.kValue + 4]); });
  unrolled<2>([&](auto j) CLAQ_STEP { lanes[j.kValue] = add(lanes[j.kValue], lanes[j.kValue + 2]); });
  return add(lanes[0], lanes[1]);
}

// step(j, Constant<j % 8>()) for j in [0, count).
template <class Step>
CLAQ_INLINE void for_entries(int64_t count, const Step& step) {
  int64_t j = 0;
  for (; j + kOutlierLanes <= count; j += kOutlierLanes) {
    unrolled<kOutlierLanes>([&](auto lane) CLAQ_STEP { step(j + lane.kValue, lane); });
  }
  unrolled<kOutlierLanes - 1>([&](auto lane) CLAQ_STEP {
    if (lane.kValue < count - j) step(j + lane.kValue, lane);
  });
}

// Entries are read once a call, from wherever the weights are: those of the next slices are fetched meanwhile.
constexpr int64_t kEntriesAhead = 768;

template <class Element>
CLAQ_INLINE void fetch_line_ahead(const Element* entries) {
  _mm_prefetch(reinterpret_cast<const char*>(entries + kEntriesAhead), _MM_HINT_T0);
}

// In step j of a loop over steps of sixteen entries, kLane = j % 8: a line, of columns and of values by turns. All of a slice's lines at once
// kept the loop waiting.
template <int kLane, class Index>
CLAQ_INLINE void fetch_slice_ahead(const Index* index, const uint16_t* values) {
  if constexpr (kLane % 2) fetch_line_ahead(values);
  else fetch_line_ahead(index);
}

template <class Index>
CLAQ_INLINE void fetch_entries(const Index* index, const uint16_t* values, int64_t count) {
  for (int64_t i = 0; i < count; i += 32) {
    fetch_line_ahead(index + i);
    fetch_line_ahead(values + i);
  }
}

CLAQ_INLINE float half_to_single(uint16_t half) { return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(half))); }

// ---- several rows of x: a line of a column has 4, 8 or 16 of them

// The outliers of one output for kTiles lines: entry j is the kStride * j-th of `index` and of the values, which value(i) gives. The results go
// to to[0], and those of the next line `next_result` floats on.
template <int kRows, int kTiles, int kStride, class Index, class Value>
CLAQ_INLINE void lines_of_output(const Index* index, int64_t count, const Value& value, const float* transposed, int64_t next_tile,
                                 float* to, int64_t next_result) {
  using L = Line<kRows>;
  typename L::Type lanes[kTiles][kOutlierLanes];
  unrolled<kTiles>([&](auto t) CLAQ_STEP {
    unrolled<kOutlierLanes>([&](auto j) CLAQ_STEP { lanes[t.kValue][j.kValue] = L::zero(); });
  });
  for_entries(count, [&](int64_t j, auto lane) CLAQ_STEP {
    const float* line = transposed + static_cast<int64_t>(index[kStride * j]) * kRows;
    const auto factor = L::set(value(kStride * j));
    unrolled<kTiles>([&](auto t) CLAQ_STEP {
      lanes[t.kValue][lane.kValue] = L::add_product(factor, L::load(line + t.kValue * next_tile), lanes[t.kValue][lane.kValue]);
    });
  });
  unrolled<kTiles>([&](auto t) CLAQ_STEP { L::store(to + t.kValue * next_result, sum_of_lanes(lanes[t.kValue], L::add)); });
}

constexpr int64_t kConvertedFloats = 4096;

CLAQ_INLINE void convert_values(const uint16_t* values, int64_t count, float* converted) {
  for (int64_t i = 0; i < count; i += kSliceOutputs) {
    const auto* from = reinterpret_cast<const __m128i*>(values + i);
    _mm256_store_ps(converted + i, _mm256_cvtph_ps(_mm_loadu_si128(from)));
    _mm256_store_ps(converted + i + 8, _mm256_cvtph_ps(_mm_loadu_si128(from + 1)));
  }
}

// Slices of outputs, a line of each: a loop for each output. Where rows are finite each is taken to have as many entries as the longest.
template <bool kFinite, int kRows, int kTiles, class Index>
CLAQ_INLINE void lines_of_slice(const OutlierSlice& slice, const Index* index, const uint16_t* values, const int32_t* count,
                                const float* transposed, int64_t next_tile, float* to, int64_t next_result) {
  alignas(64) float converted[kConvertedFloats];
  const int64_t entries = slice.steps * kSliceOutputs;
  if (entries <= kConvertedFloats) convert_values(values, entries, converted);
  for (int64_t i = 0; i < kSliceOutputs; ++i) {
    const int64_t steps = kFinite ? slice.steps : count[i];
    const auto lines = [&](const auto& value) CLAQ_STEP {
      lines_of_output<kRows, kTiles, kSliceOutputs>(index + i, steps, value, transposed, next_tile, to + i * kRows, next_result);
    };
    if (entries <= kConvertedFloats) lines([&](int64_t k) CLAQ_STEP { return converted[k + i]; });
    else lines([&](int64_t k) CLAQ_STEP { return half_to_single(values[k + i]); });
  }
}

}  // namespace
}  // namespace claq
