// Outliers for the AVX-512 families.
#pragma once

#include "avx512_common.h"
#include "sliced_outliers.h"

namespace claq {
namespace {

// Adds what the slots of a tile came to, [kNarrowestTile], to the sums of its first `count` outputs.
CLAQ_INLINE void add_in_order(const float* of_slots, const uint8_t* slot, int64_t count, float* sums) {
  static_assert(kNarrowestTile == 6 * 16);
  __m512 v[6];
  unrolled<6>([&](auto i) CLAQ_STEP { v[i.kValue] = _mm512_load_ps(of_slots + 16 * i.kValue); });
  for (int64_t n = 0; n < count; n += 16) {
    const __m512i from = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(slot + n)));
    const __m512 low = _mm512_permutex2var_ps(v[0], from, v[1]), middle = _mm512_permutex2var_ps(v[2], from, v[3]);
    const __m512 high = _mm512_permutex2var_ps(v[4], from, v[5]);
    const __m512 either = _mm512_mask_blend_ps(_mm512_test_epi32_mask(from, _mm512_set1_epi32(32)), low, middle);
    const __m512 added = _mm512_mask_blend_ps(_mm512_test_epi32_mask(from, _mm512_set1_epi32(64)), either, high);
    _mm512_storeu_ps(sums + n, _mm512_add_ps(_mm512_loadu_ps(sums + n), added));
  }
}

// ---- one row of x

constexpr int64_t kCopiedFloats = 1024;

// The activations of entries, sixteen at a time: by one instruction, inserted one by one (Zen), or copied, a slice's before they are used. Zen 4
// adds outliers in 0.92 to 0.98 of the time of a whole product when they are inserted instead of copied.
template <class Index>
CLAQ_INLINE void copy_activations(const float* scaled, const Index* columns, int64_t count, float* copies) {
  const auto copy = [&](int64_t i) CLAQ_STEP {
    int64_t column = columns[i];
    __asm__("" : "+r"(column));  // else GCC loads columns as vectors, and moves them to where addresses are one by one
    copies[i] = scaled[column];
  };
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) unrolled<4>([&](auto j) CLAQ_STEP { copy(i + j.kValue); });
  for (; i < count; ++i) copy(i);
}

CLAQ_INLINE __m128 load_four(const float* from, int64_t a, int64_t b, int64_t c, int64_t d) {
  __m128 four = _mm_load_ss(from + a);
  four = _mm_insert_ps(four, _mm_load_ss(from + b), 0x10);
  four = _mm_insert_ps(four, _mm_load_ss(from + c), 0x20);
  return _mm_insert_ps(four, _mm_load_ss(from + d), 0x30);
}
CLAQ_INLINE __m128 load_four(const float* from, const int32_t* at) { return load_four(from, at[0], at[1], at[2], at[3]); }
// All four columns by one load: there are as many loads besides as a core can do.
CLAQ_INLINE __m128 load_four(const float* from, const uint16_t* at) {
  uint64_t four;
  __builtin_memcpy(&four, at, sizeof four);
  __asm__("" : "+r"(four));  // else GCC loads them one by one
  const auto column = [&](int i) CLAQ_STEP { return static_cast<int64_t>((four >> (16 * i)) & 0xffff); };
  return load_four(from, column(0), column(1), column(2), column(3));
}

template <class Index>
CLAQ_INLINE __m512 load_sixteen(const float* from, const Index* at) {
  const __m256 low = _mm256_set_m128(load_four(from, at + 4), load_four(from, at));
  const __m256 high = _mm256_set_m128(load_four(from, at + 12), load_four(from, at + 8));
  return _mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1);
}

CLAQ_INLINE __m512i sixteen_columns(const uint16_t* index) {
  return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(index)));
}
CLAQ_INLINE __m512i sixteen_columns(const int32_t* index) { return _mm512_loadu_si512(index); }

template <Tuning kTuning, class Index>
CLAQ_INLINE __m512 row_of_slice(const OutlierSlice& slice, const OutlierSlices& slices, const int32_t* count, const float* scaled) {
  const Index* index = static_cast<const Index*>(slices.index) + slice.first;
  const uint16_t* values = slices.value + slice.first;
  const __m512i counts = _mm512_loadu_si512(count);
  __m512 lanes[kOutlierLanes];
  unrolled<kOutlierLanes>([&](auto lane) CLAQ_STEP { lanes[lane.kValue] = _mm512_setzero_ps(); });
  constexpr int64_t kMostSteps = kCopiedFloats / kSliceOutputs;
  alignas(64) float copies[kCopiedFloats];
  for (int64_t first = 0; first < slice.steps; first += kMostSteps) {
    const int64_t steps = slice.steps - first < kMostSteps ? slice.steps - first : kMostSteps;
    if constexpr (kTuning == Tuning::kPlain) copy_activations(scaled, index + first * kSliceOutputs, steps * kSliceOutputs, copies);
    for_entries(steps, [&](int64_t j, auto lane) CLAQ_STEP {
      const int64_t at = (first + j) * kSliceOutputs;
      fetch_slice_ahead<decltype(lane)::kValue>(index + at, values + at);
      // A slot that has no entry j has a value of 0 there, and what it is multiplied by may be infinite.
      const __mmask16 mask = _mm512_cmpgt_epi32_mask(counts, _mm512_set1_epi32(static_cast<int32_t>(first + j)));
      const __m512 value = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(values + at)));
      __m512 x;
      if constexpr (kTuning == Tuning::kGathers) x = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), mask, sixteen_columns(index + at), scaled, 4);
      else if constexpr (kTuning == Tuning::kZen) x = _mm512_maskz_mov_ps(mask, load_sixteen(scaled, index + at));
      else x = _mm512_maskz_loadu_ps(mask, copies + j * kSliceOutputs);
      lanes[lane.kValue] = _mm512_fmadd_ps(value, x, lanes[lane.kValue]);
    });
  }
  return sum_of_lanes(lanes, [](__m512 a, __m512 b) CLAQ_STEP { return _mm512_add_ps(a, b); });
}

template <Tuning kTuning, class Index>
inline void add_outliers_of_row(const LayerView& layer, const float* scaled, int64_t n0, int64_t n1, float* sums) {
  add_slices_of_row<Index>(
      layer, scaled, n0, n1, sums,
      [&](const OutlierSlice& slice, const int32_t* count, float* to) CLAQ_STEP {
        _mm512_store_ps(to, row_of_slice<kTuning, Index>(slice, *layer.outlier_slices, count, scaled));
      },
      [](const float* of_slots, const uint8_t* slot, int64_t count, float* to) CLAQ_STEP { add_in_order(of_slots, slot, count, to); });
}

// ---- more rows: a line of a column has 4, 8 or 16 of them

template <>
struct Line<16> {
  using Type = __m512;
  static Type zero() { return _mm512_setzero_ps(); }
  static Type set(float v) { return _mm512_set1_ps(v); }
  static Type load(const float* p) { return _mm512_load_ps(p); }
  static void store(float* p, Type v) { _mm512_store_ps(p, v); }
  static Type add(Type a, Type b) { return _mm512_add_ps(a, b); }
  static Type add_product(Type a, Type b, Type sum) { return _mm512_fmadd_ps(a, b, sum); }
};

// The vector that has 16 / kRows of the lines, beside each other.
template <int kRows, class Index>
CLAQ_INLINE __m512 lines_beside(const float* lines, const Index* index) {
  const auto line = [&](int i) CLAQ_STEP { return lines + static_cast<int64_t>(index[i]) * kRows; };
  if constexpr (kRows == 16) return _mm512_load_ps(line(0));
  else if constexpr (kRows == 4) {
    const __m512 one = _mm512_broadcast_f32x4(_mm_load_ps(line(0)));
    const __m512 two = _mm512_mask_broadcast_f32x4(one, 0x00f0, _mm_load_ps(line(1)));
    const __m512 three = _mm512_mask_broadcast_f32x4(two, 0x0f00, _mm_load_ps(line(2)));
    return _mm512_mask_broadcast_f32x4(three, 0xf000, _mm_load_ps(line(3)));
  } else {
    return _mm512_mask_broadcast_f32x8(_mm512_broadcast_f32x8(_mm256_load_ps(line(0))), 0xff00, _mm256_load_ps(line(1)));
  }
}

// Each of 16 / kRows values kRows times.
template <int kRows>
CLAQ_INLINE __m512 repeat_values(const float* values) {
  if constexpr (kRows == 4) {
    return _mm512_permutevar_ps(_mm512_broadcast_f32x4(_mm_load_ps(values)),
                                _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3));
  } else {
    return _mm512_permutevar_ps(_mm512_broadcast_f32x2(_mm_castsi128_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(values)))),
                                _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1));
  }
}

// The same for 4 or 8 finite rows, of which a vector takes several outputs.
template <int kRows, class Index>
CLAQ_INLINE void short_lines_of_slice(const OutlierSlice& slice, const Index* index, const uint16_t* values, const float* lines, float* to) {
  constexpr int64_t kMostSteps = kConvertedFloats / kSliceOutputs;
  alignas(64) float converted[kConvertedFloats];
  for (int64_t q = 0; q < kRows; ++q) {
    __m512 sums[kOutlierLanes];
    unrolled<kOutlierLanes>([&](auto lane) CLAQ_STEP { sums[lane.kValue] = _mm512_setzero_ps(); });
    for (int64_t first = 0; first < slice.steps; first += kMostSteps) {
      const int64_t steps = slice.steps - first < kMostSteps ? slice.steps - first : kMostSteps;
      if (q == 0 || slice.steps > kMostSteps) convert_values(values + first * kSliceOutputs, steps * kSliceOutputs, converted);
      const Index* from = index + first * kSliceOutputs + q * (16 / kRows);
      for_entries(steps, [&](int64_t j, auto lane) CLAQ_STEP {
        const __m512 x = lines_beside<kRows>(lines, from + j * kSliceOutputs);
        const __m512 value = repeat_values<kRows>(converted + j * kSliceOutputs + q * (16 / kRows));
        sums[lane.kValue] = _mm512_fmadd_ps(value, x, sums[lane.kValue]);
      });
    }
    _mm512_store_ps(to + 16 * q, sum_of_lanes(sums, Line<16>::add));
  }
}

// Rows [m, last) of x, which begin in the first of kTiles tiles of kRows.
template <bool kFinite, int kRows, int kTiles, class Index>
inline void add_outliers_of_tiles(const LayerView& layer, const Activations& activations, int64_t m, int64_t last, int64_t n0,
                                  int64_t n1, float* sums, int64_t stride) {
  const OutlierSlices& slices = *layer.outlier_slices;
  const int64_t tile = m / kRows, next_tile = kRows * layer.columns;
  const float* transposed = activations.transposed + tile * next_tile;
  constexpr int64_t kResults = kRows * kNarrowestTile;
  alignas(64) float lines[kTiles * kResults];  // a line for each slot
  for (int64_t n = n0; n < n1; n += kNarrowestTile) {
    for (int64_t s = 0; s < kNarrowestTile; s += kSliceOutputs) {
      const OutlierSlice& slice = slices.slices[(n + s) / kSliceOutputs];
      float* to = lines + s * kRows;
      if (slice.steps == kAsRows) {
        lines_of_rows<kRows, kTiles, Index>(layer, n, s, transposed, next_tile, to, kResults);
        continue;
      }
      const Index* index = static_cast<const Index*>(slices.index) + slice.first;
      const uint16_t* values = slices.value + slice.first;
      fetch_entries(index, values, slice.steps * kSliceOutputs);
      if constexpr (kRows < 16) {
        short_lines_of_slice<kRows>(slice, index, values, transposed, to);
      } else {
        lines_of_slice<kFinite, kRows, kTiles>(slice, index, values, slices.count + n + s, transposed, next_tile, to, kResults);
      }
    }
    const uint8_t* slot = slices.slot + n;
    const int64_t count = n1 - n < kNarrowestTile ? n1 - n : kNarrowestTile;
    for (int64_t i = 0; i < count; i += 16) {
      for (int64_t t = 0; t < kTiles; ++t) {
        __m512 v[kRows];
        unrolled<kRows>([&](auto j) CLAQ_STEP {
          v[j.kValue] = lines_beside<kRows>(lines + t * kResults, slot + i + j.kValue * (16 / kRows));
        });
        transpose_lines(v);
        const int64_t first = (tile + t) * kRows;
        for (int r = 0; r < kRows; ++r) {
          if (first + r < m || first + r >= last) continue;
          float* sum = sums + (first + r - m) * stride + n - n0 + i;
          _mm512_storeu_ps(sum, _mm512_add_ps(_mm512_loadu_ps(sum), v[r]));
        }
      }
    }
  }
}

template <class Index>
inline void add_outliers_with(const LayerView& layer, const Activations& activations, int64_t m0, int64_t m1, int64_t n0, int64_t n1,
                              float* sums, int64_t stride) {
  if (!activations.transposed) {
    const auto of_row = layer.tuning == Tuning::kGathers ? add_outliers_of_row<Tuning::kGathers, Index>
                        : layer.tuning == Tuning::kZen   ? add_outliers_of_row<Tuning::kZen, Index>
                                                         : add_outliers_of_row<Tuning::kPlain, Index>;
    for (int64_t m = m0; m < m1; ++m) of_row(layer, activations.scaled + m * activations.stride, n0, n1, sums + (m - m0) * stride);
    return;
  }
  if (activations.line_rows == 4) return add_outliers_of_tiles<true, 4, 1, Index>(layer, activations, m0, m1, n0, n1, sums, stride);
  if (activations.line_rows == 8) return add_outliers_of_tiles<true, 8, 1, Index>(layer, activations, m0, m1, n0, n1, sums, stride);
  constexpr int kRows = kRowsAtOnce;
  const auto one = activations.quantized ? add_outliers_of_tiles<true, kRows, 1, Index> : add_outliers_of_tiles<false, kRows, 1, Index>;
  const auto two = activations.quantized ? add_outliers_of_tiles<true, kRows, 2, Index> : add_outliers_of_tiles<false, kRows, 2, Index>;
  for (int64_t m = m0; m < m1;) {
    const int64_t next = (m / kRows + 1) * kRows, last = m1 < next + kRows ? m1 : next + kRows;
    (next < m1 ? two : one)(layer, activations, m, last, n0, n1, sums + (m - m0) * stride, stride);
    m = last;
  }
}

inline void add_outliers(const LayerView& layer, const Activations& activations, int64_t m0, int64_t m1, int64_t n0,
                         int64_t n1, float* sums, int64_t stride) {
  const auto add = layer.wide_outlier_index ? add_outliers_with<int32_t> : add_outliers_with<uint16_t>;
  add(layer, activations, m0, m1, n0, n1, sums, stride);
}

}  // namespace
}  // namespace claq
