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

// Adds the outliers to the sums of outputs [n0, n1): what the sixteen outputs of a slice come to is of_slice(slice, their numbers of entries,
// where it goes), and add_in_order(what the slots of a tile came to, slot of each output, outputs, their sums) puts it in order.
template <class Index, class OfSlice, class AddInOrder>
CLAQ_INLINE void add_slices_of_row(const LayerView& layer, const float* scaled, int64_t n0, int64_t n1, float* sums, const OfSlice& of_slice,
                                   const AddInOrder& add_in_order) {
  const OutlierSlices& slices = *layer.outlier_slices;
  alignas(64) float of_slots[kNarrowestTile];
  for (int64_t n = n0; n < n1; n += kNarrowestTile) {
    for (int64_t s = 0; s < kNarrowestTile; s += kSliceOutputs) {
      const OutlierSlice& slice = slices.slices[(n + s) / kSliceOutputs];
      if (slice.steps != kAsRows) {
        of_slice(slice, slices.count + n + s, of_slots + s);
        continue;
      }
      for (int64_t i = s; i < s + kSliceOutputs; ++i) {
        const int64_t entry = slices.count[n + i] ? layer.outlier_ptr[n + slices.output[n + i]] : 0;
        of_slots[i] = row_of_output(static_cast<const Index*>(layer.outlier_index) + entry, layer.outlier_value + entry, slices.count[n + i],
                                    scaled);
      }
    }
    add_in_order(of_slots, slices.slot + n, n1 - n < kNarrowestTile ? n1 - n : kNarrowestTile, sums + n - n0);
  }
}

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

// The same for sixteen slots of the tile that begins at output n, the first being `slot`, whose outputs are read where the format has them.
template <int kRows, int kTiles, class Index>
CLAQ_INLINE void lines_of_rows(const LayerView& layer, int64_t n, int64_t slot, const float* transposed, int64_t next_tile, float* to,
                               int64_t next_result) {
  for (int64_t i = 0; i < kSliceOutputs; ++i) {
    const int64_t place = n + slot + i, count = layer.outlier_slices->count[place];
    const int64_t entry = count ? layer.outlier_ptr[n + layer.outlier_slices->output[place]] : 0;
    const auto value = [&](int64_t k) CLAQ_STEP { return half_to_single(layer.outlier_value[entry + k]); };
    lines_of_output<kRows, kTiles, 1>(static_cast<const Index*>(layer.outlier_index) + entry, count, value, transposed, next_tile,
                                      to + i * kRows, next_result);
  }
}

}  // namespace
}  // namespace claq
