// Outliers for the AVX-512 families.
#pragma once

#include "avx512_common.h"

namespace claq {
namespace {

// Entry i of an output is summed in lane i % 8, and the lanes then by halves. A jump for each output that depends on how many entries it
// has would be mispredicted nearly every time: outputs are taken together, eight entries of each at a time, as often as the longest of
// them asks for, and what is not theirs is masked.

CLAQ_INLINE __m256 outlier_values(const uint16_t* values, int32_t i, __mmask8 mask) {
  return _mm256_cvtph_ps(_mm_maskz_loadu_epi16(mask, values + i));
}

inline __mmask8 entries_left(int32_t i, int32_t end) {
  const int32_t left = end - i;
  return left >= kOutlierLanes ? __mmask8{0xff} : static_cast<__mmask8>((1u << left) - 1u);
}

// ---- up to eight rows of x: what entries are multiplied by is first copied, one after the other. Copies take less time than gather
// instructions, and what an output has less than eight of costs nothing there.

constexpr int32_t kCopiedFloats = 8 * 1024;  // at most

// The lines of `count` columns from columns[0] on. kRows may be 1.
template <int kRows, class Index>
CLAQ_INLINE void copy_lines(const float* lines, const Index* columns, int32_t count, float* copies) {
  const auto copy = [&](int64_t i) CLAQ_STEP {
    int64_t column = columns[i];
    __asm__("" : "+r"(column));  // else GCC loads columns as vectors, and moves them to where addresses are one by one
    const float* from = lines + column * kRows;
    float* to = copies + i * kRows;
    if constexpr (kRows == 1) *to = *from;
    else if constexpr (kRows == 4) _mm_store_ps(to, _mm_load_ps(from));
    else _mm256_store_ps(to, _mm256_load_ps(from));
  };
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) unrolled<4>([&](auto j) CLAQ_STEP { copy(i + j.kValue); });
  for (; i < count; ++i) copy(i);
}

// Ones and then zeros: eight from 8 - i on keep i lanes.
alignas(64) constexpr int32_t kKeptLanes[16] = {-1, -1, -1, -1, -1, -1, -1, -1};

CLAQ_INLINE __m256 keep_lanes(__m256 lanes, int64_t count) {
  return _mm256_and_ps(lanes, _mm256_loadu_ps(reinterpret_cast<const float*>(kKeptLanes + 8) - count));
}

// The lanes of an output for kRows rows of x; a vector holds 16 / kRows of them. Of the eight entries that add() is given `count` are the
// output's.
template <int kRows>
struct OutlierLanes {
  static constexpr int kVectors = kRows / 2;
  __m512 sums[kVectors];

  CLAQ_INLINE OutlierLanes() {
    unrolled<kVectors>([&](auto v) CLAQ_STEP { sums[v.kValue] = _mm512_setzero_ps(); });
  }
  CLAQ_INLINE void add(__m256 values, const float* lines, int64_t count) {
    const __m512 eight = _mm512_castps256_ps512(keep_lanes(values, count));
    unrolled<kVectors>([&](auto v) CLAQ_STEP {
      constexpr int kFirst = decltype(v)::kValue * 16 / kRows;
      const __m512i lanes = kRows == 4 ? _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3)
                                       : _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
      const __m512 spread = _mm512_permutexvar_ps(_mm512_add_epi32(lanes, _mm512_set1_epi32(kFirst)), eight);
      sums[v.kValue] = _mm512_fmadd_ps(spread, _mm512_loadu_ps(lines + 16 * v.kValue), sums[v.kValue]);
    });
  }
};
template <>
struct OutlierLanes<1> {
  __m256 sums = _mm256_setzero_ps();

  // Here another output's columns may be infinite.
  CLAQ_INLINE void add(__m256 values, const float* lines, int64_t count) {
    sums = _mm256_fmadd_ps(values, keep_lanes(_mm256_loadu_ps(lines), count), sums);
  }
};

// v[i] becomes the sum of its lanes by halves, in lane i.
CLAQ_INLINE __m256 sum_by_halves(const OutlierLanes<1> (&v)[8]) {
  // Output j beside output j + 4, then both beside two others, and so on.
  const auto halves = [&](auto j) CLAQ_STEP {
    const __m256 a = v[j.kValue].sums, b = v[j.kValue + 4].sums;
    return _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
  };
  const auto quarters = [](__m256 p, __m256 q) CLAQ_STEP {
    const __m256d a = _mm256_castps_pd(p), b = _mm256_castps_pd(q);
    return _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(a, b)), _mm256_castpd_ps(_mm256_unpackhi_pd(a, b)));
  };
  const __m256 a = quarters(halves(Constant<0>()), halves(Constant<1>())), b = quarters(halves(Constant<2>()), halves(Constant<3>()));
  return _mm256_add_ps(_mm256_shuffle_ps(a, b, 0x88), _mm256_shuffle_ps(a, b, 0xdd));
}

CLAQ_INLINE __m512 first_halves(__m512 a, __m512 b) { return _mm512_shuffle_f32x4(a, b, 0x44); }
CLAQ_INLINE __m512 second_halves(__m512 a, __m512 b) { return _mm512_shuffle_f32x4(a, b, 0xee); }

// The sums of 16 / kRows outputs, side by side.
CLAQ_INLINE __m512 sum_by_halves(const OutlierLanes<4> (&outputs)[4]) {
  const auto half = [&](auto j) CLAQ_STEP { return _mm512_add_ps(outputs[j.kValue].sums[0], outputs[j.kValue].sums[1]); };
  const __m512 a = half(Constant<0>()), b = half(Constant<1>()), c = half(Constant<2>()), d = half(Constant<3>());
  const __m512 ab = _mm512_add_ps(first_halves(a, b), second_halves(a, b)), cd = _mm512_add_ps(first_halves(c, d), second_halves(c, d));
  return _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd));
}
CLAQ_INLINE __m512 sum_by_halves(const OutlierLanes<8> (&outputs)[2]) {
  const auto quarter = [&](auto j) CLAQ_STEP {
    const __m512* sums = outputs[j.kValue].sums;
    return _mm512_add_ps(_mm512_add_ps(sums[0], sums[2]), _mm512_add_ps(sums[1], sums[3]));
  };
  const __m512 a = quarter(Constant<0>()), b = quarter(Constant<1>());
  return _mm512_add_ps(first_halves(a, b), second_halves(a, b));
}

template <int kRows, class Index>
struct CopiedOutliers {
  static constexpr int32_t kMost = kCopiedFloats / kRows;
  static constexpr int32_t kStep = kOutlierLanes * kRows;
  const LayerView& layer;
  const Index* columns;
  const float* lines;
  const int32_t entries;  // of the layer
  int32_t first;          // entry of the first copy
  int32_t finite;         // entry before which copies are finite if x is
  bool complete;          // whether the copies are all entries of the outputs that open() was called for
  alignas(64) float copies[kCopiedFloats + kStep];

  CopiedOutliers(const LayerView& of, const Index* at, const float* from)
      : layer(of), columns(at), lines(from), entries(of.outlier_ptr[of.out_features]) {}

  CLAQ_INLINE void open(int64_t n, int64_t count) {
    first = layer.outlier_ptr[n];
    finite = layer.outlier_ptr[n + count];
    complete = finite - first <= kMost;
    if (complete) copy_lines<kRows>(lines, columns + first, finite - first, copies);
  }

  // The sums of outputs [n, n + kOutputs), which are among those that were opened; those from n + count on have none.
  template <int kOutputs>
  CLAQ_INLINE auto sums_of(int64_t n, int64_t count) {
    const int32_t* ptr = layer.outlier_ptr + n;
    if (count >= kOutputs && complete) {
      constexpr auto kMask = static_cast<__mmask8>((1u << kOutputs) - 1u);
      __m256i left = _mm256_sub_epi32(_mm256_maskz_loadu_epi32(kMask, ptr + 1), _mm256_maskz_loadu_epi32(kMask, ptr));
      __m128i most = _mm_max_epi32(_mm256_castsi256_si128(left), _mm256_extracti128_si256(left, 1));
      most = _mm_max_epi32(most, _mm_shuffle_epi32(most, 0x4e));
      const int32_t longest = _mm_cvtsi128_si32(_mm_max_epi32(most, _mm_shuffle_epi32(most, 0xb1)));
      // Where eight entries may be read of each output, be they its own or not.
      const int32_t reach = ptr[kOutputs - 1] + ((longest + kOutlierLanes - 1) & -kOutlierLanes);
      if (reach <= entries && reach - first <= kMost) {
        for (; finite < reach; finite += kOutlierLanes) clear(finite);
        OutlierLanes<kRows> lanes[kOutputs];
        for (int32_t i = 0; i < longest; i += kOutlierLanes) {
          alignas(32) int32_t counts[8];
          const __m256i bounded = _mm256_min_epi32(_mm256_max_epi32(left, _mm256_setzero_si256()), _mm256_set1_epi32(kOutlierLanes));
          _mm256_store_si256(reinterpret_cast<__m256i*>(counts), bounded);
          left = _mm256_sub_epi32(left, _mm256_set1_epi32(kOutlierLanes));
          const uint16_t* values = layer.outlier_value + i;
          unrolled<kOutputs>([&](auto j) CLAQ_STEP {
            const int64_t at = ptr[j.kValue];
            const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values + at));
            lanes[j.kValue].add(_mm256_cvtph_ps(halves), copies + (at + (i - first)) * kRows, counts[j.kValue]);
          });
        }
        return sum_by_halves(lanes);
      }
    }
    OutlierLanes<kRows> lanes[kOutputs];
    for (int j = 0; j < kOutputs && j < count; ++j) add_output(ptr[j], ptr[j + 1], lanes[j]);
    return sum_by_halves(lanes);
  }

 private:
  // What masked values, zeros, are multiplied by must be finite: eight entries from i on.
  CLAQ_INLINE void clear(int32_t i) {
    for (int32_t k = 0; k < kStep; k += 8) _mm256_storeu_ps(copies + int64_t{i - first} * kRows + k, _mm256_setzero_ps());
  }

  void add_output(int32_t i, int32_t end, OutlierLanes<kRows>& lanes) {
    while (i < end) {
      int32_t last = end;
      if (!complete) {
        first = i;
        last = finite = end - i < kMost ? end : i + kMost;
        copy_lines<kRows>(lines, columns + i, last - i, copies);
      }
      for (; finite < last + kOutlierLanes; finite += kOutlierLanes) clear(finite);
      const float* from = copies + int64_t{i - first} * kRows;
      for (; i < last; i += kOutlierLanes, from += kStep) {
        const int32_t count = last - i < kOutlierLanes ? last - i : kOutlierLanes;
        lanes.add(outlier_values(layer.outlier_value, i, entries_left(i, last)), from, count);
      }
      i = last;
    }
  }
};

// One row of x.
template <class Index>
inline void add_outliers_of_row(const LayerView& layer, const Index* columns, const float* scaled, int64_t n0, int64_t n1, float* sums) {
  constexpr int64_t kTogether = 32;
  CopiedOutliers<1, Index> outliers(layer, columns, scaled);
  for (int64_t n = n0; n < n1; n += kTogether) {
    const int64_t count = n1 - n < kTogether ? n1 - n : kTogether;
    outliers.open(n, count);
    for (int64_t i = 0; i < count; i += 8) {
      float* sum = sums + n + i - n0;
      _mm256_storeu_ps(sum, _mm256_add_ps(_mm256_loadu_ps(sum), outliers.template sums_of<8>(n + i, count - i)));
    }
  }
}

// A few rows of x, all in one line of each column.
template <int kRows, class Index>
inline void add_outliers_of_lines(const LayerView& layer, const Index* columns, const Activations& activations, int64_t m0, int64_t m1,
                                  int64_t n0, int64_t n1, float* sums, int64_t stride) {
  constexpr int kInVector = 16 / kRows;
  CopiedOutliers<kRows, Index> outliers(layer, columns, activations.transposed);
  for (int64_t n = n0; n < n1; n += 16) {
    const int64_t count = n1 - n < 16 ? n1 - n : 16;
    outliers.open(n, count);
    __m512 results[kRows];
    for (int v = 0; v < kRows; ++v) results[v] = outliers.template sums_of<kInVector>(n + v * kInVector, count - v * kInVector);
    transpose_lines(results);
    for (int64_t m = m0; m < m1; ++m) {
      float* sum = sums + (m - m0) * stride + n - n0;
      _mm512_storeu_ps(sum, _mm512_add_ps(_mm512_loadu_ps(sum), results[m]));
    }
  }
}

// ---- more rows: lines of 16 rows are read where they are

// lanes[0] = the sum of kOutlierLanes lanes by halves.
template <class Type, class Add>
CLAQ_INLINE Type sum_of_lanes(Type (&lanes)[kOutlierLanes], Add add) {
  static_assert(kOutlierLanes == 8);
  unrolled<4>([&](auto j) CLAQ_STEP { lanes[j.kValue] = add(lanes[j.kValue], lanes[j.kValue + 4]); });
  unrolled<2>([&](auto j) CLAQ_STEP { lanes[j.kValue] = add(lanes[j.kValue], lanes[j.kValue + 2]); });
  return add(lanes[0], lanes[1]);
}

// The outliers of one output for kTiles * 16 rows of x: each is a fused multiply-add with kTiles lines of `transposed`. Without
// kFinite no product of 0 and infinity may be added.
template <bool kFinite, int kTiles, class Index>
inline void outliers_of_output(const LayerView& layer, const Index* columns, const float* transposed, int64_t n,
                               __m512 (&result)[kTiles]) {
  int32_t i = layer.outlier_ptr[n];
  const int32_t end = layer.outlier_ptr[n + 1], entries = layer.outlier_ptr[layer.out_features];
  const uint16_t* outlier_value = layer.outlier_value;
  const int64_t next_tile = kRowsAtOnce * layer.columns;
  __m512 lanes[kTiles][kOutlierLanes];
  unrolled<kTiles>([&](auto t) CLAQ_STEP {
    unrolled<kOutlierLanes>([&](auto j) CLAQ_STEP { lanes[t.kValue][j.kValue] = _mm512_setzero_ps(); });
  });
  alignas(32) float values[kOutlierLanes];
  const auto add = [&](auto j) CLAQ_STEP {
    const float* line = transposed + static_cast<int64_t>(columns[i + j.kValue]) * kRowsAtOnce;
    const __m512 value = _mm512_set1_ps(values[j.kValue]);
    unrolled<kTiles>([&](auto t) CLAQ_STEP {
      lanes[t.kValue][j.kValue] = _mm512_fmadd_ps(value, _mm512_loadu_ps(line + t.kValue * next_tile), lanes[t.kValue][j.kValue]);
    });
  };
  while (kFinite ? i < end && i + kOutlierLanes <= entries : i + kOutlierLanes <= end) {
    _mm256_store_ps(values, outlier_values(outlier_value, i, entries_left(i, end)));
    unrolled<kOutlierLanes>(add);
    i += kOutlierLanes;
  }
  if (i < end) {
    _mm256_store_ps(values, outlier_values(outlier_value, i, entries_left(i, end)));
    unrolled<kOutlierLanes - 1>([&](auto j) CLAQ_STEP {
      if (j.kValue < end - i) add(j);
    });
  }
  unrolled<kTiles>([&](auto t) CLAQ_STEP {
    result[t.kValue] = sum_of_lanes(lanes[t.kValue], [](__m512 x, __m512 y) CLAQ_STEP { return _mm512_add_ps(x, y); });
  });
}

// Rows [m, last) of x, which are rows [lane, ...) of the first of kTiles tiles.
template <bool kFinite, int kTiles, class Index>
inline void add_outliers_of_tiles(const LayerView& layer, const Index* columns, const Activations& activations, int64_t m,
                                  int64_t last, int64_t n0, int64_t n1, float* sums, int64_t stride) {
  const int64_t tile = m / kRowsAtOnce;
  const float* transposed = activations.transposed + tile * kRowsAtOnce * layer.columns;
  for (int64_t n = n0; n < n1; n += 16) {
    const int count = n1 - n < 16 ? static_cast<int>(n1 - n) : 16;
    __m512 results[kTiles][16];
    for (int i = 0; i < 16; ++i) {
      __m512 result[kTiles];
      for (auto& value : result) value = _mm512_setzero_ps();
      if (i < count) outliers_of_output<kFinite, kTiles>(layer, columns, transposed, n + i, result);
      for (int t = 0; t < kTiles; ++t) results[t][i] = result[t];
    }
    for (int t = 0; t < kTiles; ++t) {
      transpose_lines(results[t]);
      for (int i = 0; i < 16; ++i) {
        const int64_t row = (tile + t) * kRowsAtOnce + i;
        if (row < m || row >= last) continue;
        float* sum = sums + (row - m) * stride + n - n0;
        _mm512_storeu_ps(sum, _mm512_add_ps(_mm512_loadu_ps(sum), results[t][i]));
      }
    }
  }
}

template <class Index>
inline void add_outliers_with(const LayerView& layer, const Index* columns, const Activations& activations, int64_t m0, int64_t m1,
                              int64_t n0, int64_t n1, float* sums, int64_t stride) {
  if (activations.transposed && activations.line_rows == 4) {
    return add_outliers_of_lines<4>(layer, columns, activations, m0, m1, n0, n1, sums, stride);
  }
  if (activations.transposed && activations.line_rows == 8) {
    return add_outliers_of_lines<8>(layer, columns, activations, m0, m1, n0, n1, sums, stride);
  }
  // Of two tiles the columns of other outputs take longer than jumps over them.
  const auto one_tile = activations.quantized ? add_outliers_of_tiles<true, 1, Index> : add_outliers_of_tiles<false, 1, Index>;
  for (int64_t m = m0; m < m1;) {
    float* to = sums + (m - m0) * stride;
    const int64_t next = (m / kRowsAtOnce + 1) * kRowsAtOnce;
    if (!activations.transposed) {
      add_outliers_of_row(layer, columns, activations.scaled + m * activations.stride, n0, n1, to);
      ++m;
    } else if (next >= m1) {
      one_tile(layer, columns, activations, m, m1, n0, n1, to, stride);
      m = m1;
    } else {
      const int64_t last = next + kRowsAtOnce < m1 ? next + kRowsAtOnce : m1;
      add_outliers_of_tiles<false, 2>(layer, columns, activations, m, last, n0, n1, to, stride);
      m = last;
    }
  }
}

inline void add_outliers(const LayerView& layer, const Activations& activations, int64_t m0, int64_t m1, int64_t n0,
                         int64_t n1, float* sums, int64_t stride) {
  if (layer.wide_outlier_index) {
    add_outliers_with(layer, static_cast<const int32_t*>(layer.outlier_index), activations, m0, m1, n0, n1, sums, stride);
  } else {
    add_outliers_with(layer, static_cast<const uint16_t*>(layer.outlier_index), activations, m0, m1, n0, n1, sums, stride);
  }
}

}  // namespace
}  // namespace claq
