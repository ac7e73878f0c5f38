// What the AVX-512 families share: activations, float32 sums, outliers, the epilogue and 16-bit conversions.
//
// Included only by files that are compiled for AVX-512 F, BW, DQ and VL. Everything is in an unnamed namespace and nothing
// of the C++ library is used, so that no AVX-512 instance of a shared inline function can end up in other code.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "family.h"
#include "layout.h"

// For steps of inner loops: a call would pass vectors through memory.
#define CLAQ_INLINE inline __attribute__((always_inline))

namespace claq {
namespace {

constexpr int64_t kRowsAtOnce = 16;  // of x, that are made and transposed together

inline __mmask16 first_lanes(int64_t count) {
  return count >= 16 ? __mmask16{0xffff} : static_cast<__mmask16>((1u << count) - 1u);
}

// A number as a type, to choose an instance of a template at run time.
template <int kNumber>
struct Constant {
  static constexpr int kValue = kNumber;
};

// Calls tile(Constant<left>) for 0 < left <= kMost, nothing for 0.
template <int kMost, class Tile>
inline void for_tail(int64_t left, const Tile& tile) {
  if constexpr (kMost > 0) {
    if (left == kMost) tile(Constant<kMost>{});
    else for_tail<kMost - 1>(left, tile);
  }
}

// Sixteen code words of one row of `codes`; lanes past the last output read as 0.
template <bool kTail>
inline __m512i load_words(const uint32_t* words, __mmask16 mask) {
  return kTail ? _mm512_maskz_loadu_epi32(mask, words) : _mm512_loadu_si512(words);
}

// Zeroes the tile, rounded up to whole vectors.
inline void clear_sums(int64_t rows, int64_t count, float* sums, int64_t stride) {
  for (int64_t m = 0; m < rows; ++m) {
    for (int64_t n = 0; n < count; n += 16) _mm512_storeu_ps(sums + m * stride + n, _mm512_setzero_ps());
  }
}

// Byte order of a 16-byte half of a block that column_of_position asks for.
inline __m256i position_shuffle(int width) {
  const __m128i four = _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
  const __m128i two = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return _mm256_broadcastsi128_si256(width == 4 ? four : two);
}

inline __m512 load_scaled(const LayerView& layer, const float* x, int64_t p) {
  const __m512 scale = _mm512_loadu_ps(layer.scale + p);
  __m512 values;
  if (layer.identity_order) {
    const int64_t feature = layer.first_feature + p, left = layer.in_features - feature;
    values = left >= 16 ? _mm512_loadu_ps(x + feature) : _mm512_maskz_loadu_ps(left > 0 ? first_lanes(left) : 0, x + feature);
  } else {
    const __m512i index = _mm512_loadu_si512(layer.gather + p);
    const __mmask16 present = _mm512_cmpge_epi32_mask(index, _mm512_setzero_si512());
    values = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), present, index, x, 4);
  }
  return _mm512_mul_ps(scale, values);
}

inline bool prepare_row(const LayerView& layer, const float* x, Activations& activations, int64_t row, bool quantize) {
  float* scaled = activations.scaled ? activations.scaled + row * activations.stride : nullptr;
  const PackedPlace place = packed_place(layer, activations, row);
  const __m512i magnitude_bits = _mm512_set1_epi32(0x7fffffff);
  const __m256i group_offsets = _mm256_mullo_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7),
                                                   _mm256_set1_epi32(static_cast<int>(place.rows)));
  const uint32_t infinity = 0x7f800000u;
  bool exact = false;
  for (int s = 0; s < layer.segment_count; ++s) {
    const Segment& segment = layer.segments[s];
    const __m256i shuffle = position_shuffle(segment.width);
    for (int64_t b = segment.first_block; b < segment.first_block + segment.blocks; ++b) {
      const __m512 low = load_scaled(layer, x, b * kBlock);
      const __m512 high = load_scaled(layer, x, b * kBlock + 16);
      if (scaled) {
        _mm512_storeu_ps(scaled + b * kBlock, low);
        _mm512_storeu_ps(scaled + b * kBlock + 16, high);
      }
      // As integers, magnitudes compare as their floats do, and infinities and NaNs are above all finite ones.
      const uint32_t bits = _mm512_reduce_max_epu32(
          _mm512_max_epu32(_mm512_and_si512(_mm512_castps_si512(low), magnitude_bits),
                           _mm512_and_si512(_mm512_castps_si512(high), magnitude_bits)));
      const float largest = _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(static_cast<int32_t>(bits))));
      const bool special = bits >= infinity || (bits != 0 && largest < kSmallestMagnitude);
      exact |= special;
      if (!quantize) continue;
      const bool zero = special || bits == 0;
      const __mmask16 kept = zero ? 0 : 0xffff;
      const __m512 inverse = _mm512_set1_ps(127.0f / largest);
      const __m512i first = _mm512_maskz_cvtps_epi32(kept, _mm512_mul_ps(low, inverse));
      const __m512i second = _mm512_maskz_cvtps_epi32(kept, _mm512_mul_ps(high, inverse));
      const __m256i bytes = _mm256_shuffle_epi8(
          _mm256_set_m128i(_mm512_cvtsepi32_epi8(second), _mm512_cvtsepi32_epi8(first)), shuffle);
      int8_t* quantized = place.quantized + b * kBlock * place.rows;
      if (place.rows == 1) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(quantized), bytes);
      } else {
        _mm256_i32scatter_epi32(quantized, group_offsets, bytes, 4);
      }
      place.scale[b * place.rows] = zero ? 0.0f : largest / 127.0f;
      place.correction[b * place.rows] = -128 * _mm512_reduce_add_epi32(_mm512_add_epi32(first, second));
    }
  }
  return !exact;
}

// A 16 x 16 transposition in four steps of pairwise interleaving.
inline void transpose_16x16(__m512 (&r)[16]) {
  __m512 t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(t[i]), _mm512_castps_pd(t[i + 2])));
    r[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(t[i]), _mm512_castps_pd(t[i + 2])));
    r[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(t[i + 1]), _mm512_castps_pd(t[i + 3])));
    r[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(t[i + 1]), _mm512_castps_pd(t[i + 3])));
  }
  for (int i = 0; i < 16; i += 8) {
    for (int j = 0; j < 4; ++j) {
      t[i + j] = _mm512_shuffle_f32x4(r[i + j], r[i + j + 4], 0x88);
      t[i + j + 4] = _mm512_shuffle_f32x4(r[i + j], r[i + j + 4], 0xdd);
    }
  }
  for (int j = 0; j < 8; ++j) {
    r[j] = _mm512_shuffle_f32x4(t[j], t[j + 8], 0x88);
    r[j + 8] = _mm512_shuffle_f32x4(t[j], t[j + 8], 0xdd);
  }
}

inline void transpose(const LayerView& layer, Activations& activations, int64_t tile) {
  float* to = activations.transposed + tile * kRowsAtOnce * layer.columns;
  for (int64_t p = 0; p < layer.columns; p += 16) {
    __m512 rows[16];
    for (int i = 0; i < 16; ++i) {
      const int64_t row = tile * kRowsAtOnce + i;
      rows[i] = row < activations.rows ? _mm512_loadu_ps(activations.scaled + row * activations.stride + p)
                                       : _mm512_setzero_ps();
    }
    transpose_16x16(rows);
    for (int i = 0; i < 16; ++i) _mm512_storeu_ps(to + (p + i) * kRowsAtOnce, rows[i]);
  }
}

// Selects bits of `a` where the mask has ones, else of `b`.
inline __m512i select_bits(int32_t mask, __m512i a, __m512i b) { return _mm512_ternarylogic_epi32(_mm512_set1_epi32(mask), a, b, 0xca); }

// Lanes are rows of x here: gathering is loading lines of the transposed rows, and nothing is summed across lanes.
inline void prepare_tile(const LayerView& layer, const float* const* x, Activations& activations, int64_t first, int64_t first_block,
                         int64_t last_block, float* features, uint8_t* exact) {
  const int64_t left = activations.rows - first;
  const int count = left < kRowsAtOnce ? static_cast<int>(left) : static_cast<int>(kRowsAtOnce);
  const Range needed = features_of(layer, first_block, last_block);
  for (int64_t k = needed.begin; k < needed.end; k += 16) {
    const __mmask16 present = first_lanes(needed.end - k);
    __m512 lines[16];
    for (int i = 0; i < 16; ++i) lines[i] = i < count ? _mm512_maskz_loadu_ps(present, x[i] + k) : _mm512_setzero_ps();
    transpose_16x16(lines);
    for (int i = 0; i < 16 && k + i < needed.end; ++i) _mm512_store_ps(features + (k + i) * kRowsAtOnce, lines[i]);
  }
  // Two packed tiles; without rows for a second one nothing is stored there, and it must only not be a null pointer.
  const PackedPlace place = packed_place(layer, activations, first);
  const PackedPlace next = count > kPackedRows ? packed_place(layer, activations, first + kPackedRows) : place;
  const auto mask = static_cast<__mmask8>((1u << place.rows) - 1u);
  const auto next_mask = static_cast<__mmask8>(count > kPackedRows ? (1u << next.rows) - 1u : 0u);
  const __m512i magnitude_bits = _mm512_set1_epi32(0x7fffffff);
  float* transposed = activations.transposed ? activations.transposed + first * layer.columns : nullptr;
  __mmask16 all_special = 0;
  alignas(64) float block[kBlock][kRowsAtOnce];
  for (int s = 0; s < layer.segment_count; ++s) {
    const Segment& segment = layer.segments[s];
    const Range blocks = overlap(segment, first_block, last_block);
    for (int64_t b = blocks.begin; b < blocks.end; ++b) {
      __m512i bits = _mm512_setzero_si512();
      for (int i = 0; i < kBlock; ++i) {
        const int64_t p = b * kBlock + i;
        const int32_t feature = layer.gather[p];
        const __m512 line = feature < 0 ? _mm512_setzero_ps() : _mm512_load_ps(features + feature * kRowsAtOnce);
        const __m512 value = _mm512_mul_ps(_mm512_set1_ps(layer.scale[p]), line);
        _mm512_store_ps(block[i], value);
        if (transposed) {
          switch (activations.line_rows) {
            case 4: _mm_store_ps(transposed + p * 4, _mm512_castps512_ps128(value)); break;
            case 8: _mm256_store_ps(transposed + p * 8, _mm512_castps512_ps256(value)); break;
            default: _mm512_store_ps(transposed + p * kRowsAtOnce, value);
          }
        }
        bits = _mm512_max_epu32(bits, _mm512_and_si512(_mm512_castps_si512(value), magnitude_bits));
      }
      const __m512 largest = _mm512_castsi512_ps(bits);
      const __mmask16 nonzero = _mm512_test_epi32_mask(bits, bits);
      const __mmask16 special =
          _mm512_cmpge_epu32_mask(bits, _mm512_set1_epi32(0x7f800000)) |
          _mm512_mask_cmp_ps_mask(nonzero, largest, _mm512_set1_ps(kSmallestMagnitude), _CMP_LT_OQ);
      const __mmask16 kept = static_cast<__mmask16>(nonzero & ~special);
      all_special |= special;
      const __m512 inverse = _mm512_maskz_div_ps(kept, _mm512_set1_ps(127.0f), largest);
      const __m512 scale = _mm512_maskz_div_ps(kept, largest, _mm512_set1_ps(127.0f));
      __m512i sum = _mm512_setzero_si512();
      for (int g = 0; g < kGroupsPerBlock; ++g) {
        __m512i rounded[4];
        for (int j = 0; j < 4; ++j) {
          const __m512 value = _mm512_load_ps(block[column_of_position(segment.width, 4 * g + j)]);
          rounded[j] = _mm512_maskz_cvtps_epi32(kept, _mm512_mul_ps(value, inverse));
          sum = _mm512_add_epi32(sum, rounded[j]);
        }
        const __m512i low = select_bits(0xff, rounded[0], _mm512_slli_epi32(rounded[1], 8));
        const __m512i high = select_bits(0xff, rounded[2], _mm512_slli_epi32(rounded[3], 8));
        const __m512i four = select_bits(0xffff, low, _mm512_slli_epi32(high, 16));
        const int64_t group = b * kGroupsPerBlock + g;
        _mm256_mask_storeu_epi32(place.quantized + group * 4 * place.rows, mask, _mm512_castsi512_si256(four));
        _mm256_mask_storeu_epi32(next.quantized + group * 4 * next.rows, next_mask, _mm512_extracti64x4_epi64(four, 1));
      }
      const __m512i correction = _mm512_slli_epi32(_mm512_sub_epi32(_mm512_setzero_si512(), sum), 7);
      _mm256_mask_storeu_ps(place.scale + b * place.rows, mask, _mm512_castps512_ps256(scale));
      _mm256_mask_storeu_ps(next.scale + b * next.rows, next_mask, _mm512_extractf32x8_ps(scale, 1));
      _mm256_mask_storeu_epi32(place.correction + b * place.rows, mask, _mm512_castsi512_si256(correction));
      _mm256_mask_storeu_epi32(next.correction + b * next.rows, next_mask, _mm512_extracti64x4_epi64(correction, 1));
    }
  }
  for (int i = 0; i < count; ++i) exact[i] = (all_special >> i) & 1;
}

// ---- outliers

inline __m256i outlier_columns(const LayerView& layer, int32_t i, __mmask8 mask) {
  if (layer.wide_outlier_index) {
    return _mm256_maskz_loadu_epi32(mask, static_cast<const int32_t*>(layer.outlier_index) + i);
  }
  return _mm256_cvtepu16_epi32(_mm_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(layer.outlier_index) + i));
}

inline __m256 outlier_values(const uint16_t* values, int32_t i, __mmask8 mask) {
  return _mm256_cvtph_ps(_mm_maskz_loadu_epi16(mask, values + i));
}

inline float add_by_halves(__m256 lanes) {
  __m128 sum = _mm_add_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps(lanes, 1));
  sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
  return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}

// Eight loads and insertions take half the time of a gather instruction here.
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

// The values of up to eight entries from i of an output whose last is before `end`, zeros behind them: where eight entries of
// any output follow, kernels multiply eight columns by them. Jumps over those of other outputs would be mispredicted in every
// output, as the number of its entries is not to be foretold.
CLAQ_INLINE __m256 values_before(const uint16_t* values, int32_t i, int32_t end) {
  const int32_t count = end - i < kOutlierLanes ? end - i : kOutlierLanes;
  return outlier_values(values, i, static_cast<__mmask8>((1u << count) - 1u));
}

template <class Index>
inline void add_outliers_of_row(const LayerView& layer, const Index* columns, const float* scaled, int64_t n0, int64_t n1, float* sums) {
  const int32_t entries = layer.outlier_ptr[layer.out_features];
  for (int64_t n = n0; n < n1; ++n) {
    int32_t i = layer.outlier_ptr[n];
    const int32_t end = layer.outlier_ptr[n + 1];
    if (i == end) continue;
    __m256 lanes = _mm256_setzero_ps();
    for (; i + kOutlierLanes <= end; i += kOutlierLanes) {
      lanes = _mm256_fmadd_ps(outlier_values(layer.outlier_value, i, 0xff), load_eight(scaled, columns + i), lanes);
    }
    if (i < end) {
      const auto mask = static_cast<__mmask8>((1u << (end - i)) - 1u);
      const __m256 x = i + kOutlierLanes <= entries
                           ? _mm256_maskz_mov_ps(mask, load_eight(scaled, columns + i))
                           : _mm256_mmask_i32gather_ps(_mm256_setzero_ps(), mask, outlier_columns(layer, i, mask), scaled, 4);
      lanes = _mm256_fmadd_ps(outlier_values(layer.outlier_value, i, mask), x, lanes);
    }
    sums[n - n0] += add_by_halves(lanes);
  }
}

// Lines of `transposed` for a few rows of x.
template <int kRows>
struct Line;
template <>
struct Line<4> {
  using Type = __m128;
  static CLAQ_INLINE Type load(const float* from) { return _mm_load_ps(from); }
  static CLAQ_INLINE Type zero() { return _mm_setzero_ps(); }
  static CLAQ_INLINE Type same(const float* value) { return _mm_broadcast_ss(value); }
  static CLAQ_INLINE Type add(Type a, Type b) { return _mm_add_ps(a, b); }
  static CLAQ_INLINE Type multiply_add(Type a, Type b, Type c) { return _mm_fmadd_ps(a, b, c); }
  // rows[m][i] = outputs[i][m] of four outputs.
  static CLAQ_INLINE void transpose(const Type (&outputs)[4], __m128 (&rows)[4]) {
    for (int i = 0; i < 4; ++i) rows[i] = outputs[i];
    _MM_TRANSPOSE4_PS(rows[0], rows[1], rows[2], rows[3]);
  }
};
template <>
struct Line<8> {
  using Type = __m256;
  static CLAQ_INLINE Type load(const float* from) { return _mm256_load_ps(from); }
  static CLAQ_INLINE Type zero() { return _mm256_setzero_ps(); }
  static CLAQ_INLINE Type same(const float* value) { return _mm256_broadcast_ss(value); }
  static CLAQ_INLINE Type add(Type a, Type b) { return _mm256_add_ps(a, b); }
  static CLAQ_INLINE Type multiply_add(Type a, Type b, Type c) { return _mm256_fmadd_ps(a, b, c); }
  static CLAQ_INLINE void transpose(const Type (&outputs)[4], __m128 (&rows)[8]) {
    for (int i = 0; i < 4; ++i) {
      rows[i] = _mm256_castps256_ps128(outputs[i]);
      rows[i + 4] = _mm256_extractf128_ps(outputs[i], 1);
    }
    _MM_TRANSPOSE4_PS(rows[0], rows[1], rows[2], rows[3]);
    _MM_TRANSPOSE4_PS(rows[4], rows[5], rows[6], rows[7]);
  }
};

// step(Number<0>()), step(Number<1>()), ...: a loop whose counter is a constant from the start. Sums in an array that a loop counts
// through are taken to registers only if the loop is unrolled early enough, and a pragma does not do that: they stayed on the stack.
template <int kValue>
struct Number {
  static constexpr int value = kValue;
};

template <int kCount, int kFirst = 0, class Step>
CLAQ_INLINE void unrolled(Step step) {
  if constexpr (kFirst < kCount) {
    step(Number<kFirst>());
    unrolled<kCount, kFirst + 1>(step);
  }
}

#define CLAQ_STEP __attribute__((always_inline))

// lanes[0] = the sum of kOutlierLanes lanes by halves.
template <class Type, class Add>
CLAQ_INLINE Type sum_of_lanes(Type (&lanes)[kOutlierLanes], Add add) {
  static_assert(kOutlierLanes == 8);
  unrolled<4>([&](auto j) CLAQ_STEP { lanes[j.value] = add(lanes[j.value], lanes[j.value + 4]); });
  unrolled<2>([&](auto j) CLAQ_STEP { lanes[j.value] = add(lanes[j.value], lanes[j.value + 2]); });
  return add(lanes[0], lanes[1]);
}

// The outliers of output n for all rows of x, which are in one narrow line of each column.
template <int kRows, class Index>
CLAQ_INLINE typename Line<kRows>::Type outliers_of_lines(const LayerView& layer, const Index* columns, const float* transposed,
                                                         int32_t entries, int64_t n) {
  using L = Line<kRows>;
  int32_t i = layer.outlier_ptr[n];
  const int32_t end = layer.outlier_ptr[n + 1];
  const uint16_t* outlier_value = layer.outlier_value;
  typename L::Type lanes[kOutlierLanes];
  unrolled<kOutlierLanes>([&](auto j) CLAQ_STEP { lanes[j.value] = L::zero(); });
  alignas(32) float values[kOutlierLanes];
  const auto add = [&](auto j) CLAQ_STEP {
    const float* line = transposed + static_cast<int64_t>(columns[i + j.value]) * kRows;
    lanes[j.value] = L::multiply_add(L::same(values + j.value), L::load(line), lanes[j.value]);
  };
  for (; i < end && i + kOutlierLanes <= entries; i += kOutlierLanes) {
    _mm256_store_ps(values, values_before(outlier_value, i, end));
    unrolled<kOutlierLanes>(add);
  }
  if (i < end) {  // of the last outputs
    _mm256_store_ps(values, values_before(outlier_value, i, end));
    unrolled<kOutlierLanes - 1>([&](auto j) CLAQ_STEP {
      if (j.value < end - i) add(j);
    });
  }
  return sum_of_lanes(lanes, [](typename L::Type x, typename L::Type y) CLAQ_STEP { return L::add(x, y); });
}

template <int kRows, class Index>
inline void add_outliers_of_lines(const LayerView& layer, const Index* columns, const Activations& activations, int64_t m0, int64_t m1,
                                  int64_t n0, int64_t n1, float* sums, int64_t stride) {
  using L = Line<kRows>;
  const int32_t entries = layer.outlier_ptr[layer.out_features];
  for (int64_t n = n0; n < n1; n += 4) {
    typename L::Type results[4];
    for (int i = 0; i < 4; ++i) {
      results[i] = n + i < n1 ? outliers_of_lines<kRows>(layer, columns, activations.transposed, entries, n + i) : L::zero();
    }
    __m128 rows[kRows];
    L::transpose(results, rows);
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
      if (m < m0 || m >= m1) continue;
      float* sum = sums + (m - m0) * stride + n - n0;
      _mm_storeu_ps(sum, _mm_add_ps(_mm_loadu_ps(sum), rows[m]));
    }
  }
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
    unrolled<kOutlierLanes>([&](auto j) CLAQ_STEP { lanes[t.value][j.value] = _mm512_setzero_ps(); });
  });
  alignas(32) float values[kOutlierLanes];
  const auto add = [&](auto j) CLAQ_STEP {
    const float* line = transposed + static_cast<int64_t>(columns[i + j.value]) * kRowsAtOnce;
    const __m512 value = _mm512_set1_ps(values[j.value]);
    unrolled<kTiles>([&](auto t) CLAQ_STEP {
      lanes[t.value][j.value] = _mm512_fmadd_ps(value, _mm512_loadu_ps(line + t.value * next_tile), lanes[t.value][j.value]);
    });
  };
  while (kFinite ? i < end && i + kOutlierLanes <= entries : i + kOutlierLanes <= end) {
    _mm256_store_ps(values, values_before(outlier_value, i, end));
    unrolled<kOutlierLanes>(add);
    i += kOutlierLanes;
  }
  if (i < end) {
    _mm256_store_ps(values, values_before(outlier_value, i, end));
    unrolled<kOutlierLanes - 1>([&](auto j) CLAQ_STEP {
      if (j.value < end - i) add(j);
    });
  }
  unrolled<kTiles>([&](auto t) CLAQ_STEP {
    result[t.value] = sum_of_lanes(lanes[t.value], [](__m512 x, __m512 y) CLAQ_STEP { return _mm512_add_ps(x, y); });
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
      transpose_16x16(results[t]);
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

// ---- epilogue and conversions

inline void finish_row(const LayerView& layer, int64_t n0, int64_t n1, const float* sums, float* y) {
  for (int64_t n = n0; n < n1; n += 16) {
    const __mmask16 mask = first_lanes(n1 - n);
    const __m512 scale = _mm512_maskz_loadu_ps(mask, layer.row_scale + n);
    const __m512 sum = _mm512_maskz_loadu_ps(mask, sums + n - n0);
    const __m512 result = layer.bias ? _mm512_fmadd_ps(scale, sum, _mm512_maskz_loadu_ps(mask, layer.bias + n))
                                     : _mm512_mul_ps(scale, sum);
    _mm512_mask_storeu_ps(y + n - n0, mask, result);
  }
}

inline void half_row_to_float(const uint16_t* from, float* to, int64_t count) {
  for (int64_t i = 0; i < count; i += 16) {
    const __mmask16 mask = first_lanes(count - i);
    _mm512_mask_storeu_ps(to + i, mask, _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, from + i)));
  }
}

inline void float_row_to_half(const float* from, uint16_t* to, int64_t count) {
  for (int64_t i = 0; i < count; i += 16) {
    const __mmask16 mask = first_lanes(count - i);
    const __m512 values = _mm512_maskz_loadu_ps(mask, from + i);
    _mm256_mask_storeu_epi16(to + i, mask, _mm512_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
}

}  // namespace
}  // namespace claq
