// What the AVX-512 families share: activations, float32 sums, outliers, the epilogue and 16-bit conversions.
//
// Included only by files that are compiled for AVX-512 F, BW, DQ and VL. Everything is in an unnamed namespace and nothing
// of the C++ library is used, so that no AVX-512 instance of a shared inline function can end up in other code.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "family.h"
#include "layout.h"

namespace claq {
namespace {

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
    const int64_t left = layer.in_features - p;
    values = left >= 16 ? _mm512_loadu_ps(x + p) : _mm512_maskz_loadu_ps(left > 0 ? first_lanes(left) : 0, x + p);
  } else {
    const __m512i index = _mm512_loadu_si512(layer.gather + p);
    const __mmask16 present = _mm512_cmpge_epi32_mask(index, _mm512_setzero_si512());
    values = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), present, index, x, 4);
  }
  return _mm512_mul_ps(scale, values);
}

inline bool prepare_row(const LayerView& layer, const float* x, Activations& activations, int64_t row, bool quantize) {
  float* scaled = activations.scaled ? activations.scaled + row * activations.stride : nullptr;
  int8_t* quantized = quantize ? activations.quantized + row * activations.stride : nullptr;
  float* block_scale = activations.block_scale + row * activations.block_stride;
  int32_t* correction = activations.block_correction + row * activations.block_stride;
  const __m512i magnitude_bits = _mm512_set1_epi32(0x7fffffff);
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
      exact |= bits >= infinity || (bits != 0 && largest < kSmallestMagnitude);
      if (!quantize) continue;
      const __m512 inverse = _mm512_set1_ps(bits == 0 ? 0.0f : 127.0f / largest);
      const __m512i first = _mm512_cvtps_epi32(_mm512_mul_ps(low, inverse));
      const __m512i second = _mm512_cvtps_epi32(_mm512_mul_ps(high, inverse));
      const __m256i bytes = _mm256_set_m128i(_mm512_cvtsepi32_epi8(second), _mm512_cvtsepi32_epi8(first));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(quantized + b * kBlock), _mm256_shuffle_epi8(bytes, shuffle));
      block_scale[b] = largest / 127.0f;
      correction[b] = -128 * _mm512_reduce_add_epi32(_mm512_add_epi32(first, second));
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
  float* to = activations.transposed + tile * kTransposedRows * layer.columns;
  for (int64_t p = 0; p < layer.columns; p += 16) {
    __m512 rows[16];
    for (int i = 0; i < 16; ++i) {
      const int64_t row = tile * kTransposedRows + i;
      rows[i] = row < activations.rows ? _mm512_loadu_ps(activations.scaled + row * activations.stride + p)
                                       : _mm512_setzero_ps();
    }
    transpose_16x16(rows);
    for (int i = 0; i < 16; ++i) _mm512_storeu_ps(to + (p + i) * kTransposedRows, rows[i]);
  }
}

// ---- outliers

inline __m256i outlier_columns(const LayerView& layer, int32_t i, __mmask8 mask) {
  if (layer.wide_outlier_index) {
    return _mm256_maskz_loadu_epi32(mask, static_cast<const int32_t*>(layer.outlier_index) + i);
  }
  return _mm256_cvtepu16_epi32(_mm_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(layer.outlier_index) + i));
}

inline __m256 outlier_values(const LayerView& layer, int32_t i, __mmask8 mask) {
  return _mm256_cvtph_ps(_mm_maskz_loadu_epi16(mask, layer.outlier_value + i));
}

inline float add_by_halves(__m256 lanes) {
  __m128 sum = _mm_add_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps(lanes, 1));
  sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
  return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}

template <class Index>
inline void add_outliers_of_row(const LayerView& layer, const Index* columns, const float* scaled, int64_t n0, int64_t n1, float* sums) {
  for (int64_t n = n0; n < n1; ++n) {
    const int32_t begin = layer.outlier_ptr[n], end = layer.outlier_ptr[n + 1];
    if (begin == end) continue;
    float lanes[kOutlierLanes] = {};
    alignas(32) float values[kOutlierLanes];
    const auto add = [&](int32_t i, int j) {
      lanes[j] = __builtin_fmaf(values[j], scaled[columns[i + j]], lanes[j]);
    };
    int32_t i = begin;
    for (; i + kOutlierLanes <= end; i += kOutlierLanes) {
      _mm256_store_ps(values, outlier_values(layer, i, 0xff));
#pragma GCC unroll 8
      for (int j = 0; j < kOutlierLanes; ++j) add(i, j);
    }
    const int left = end - i;
    _mm256_store_ps(values, outlier_values(layer, i, static_cast<__mmask8>((1u << left) - 1u)));
    switch (left) {
      case 7: add(i, 6); [[fallthrough]];
      case 6: add(i, 5); [[fallthrough]];
      case 5: add(i, 4); [[fallthrough]];
      case 4: add(i, 3); [[fallthrough]];
      case 3: add(i, 2); [[fallthrough]];
      case 2: add(i, 1); [[fallthrough]];
      case 1: add(i, 0); [[fallthrough]];
      default: break;
    }
    sums[n - n0] += ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
  }
}

// The outliers of one output for kTiles * 16 rows of x: each is a fused multiply-add with kTiles lines of `transposed`.
template <int kTiles, class Index>
inline void outliers_of_output(const LayerView& layer, const Index* columns, const float* transposed, int64_t n,
                               __m512 (&result)[kTiles]) {
  const int32_t begin = layer.outlier_ptr[n], end = layer.outlier_ptr[n + 1];
  __m512 lanes[kTiles][kOutlierLanes];
#pragma GCC unroll 2
  for (int t = 0; t < kTiles; ++t) {
#pragma GCC unroll 8
    for (int j = 0; j < kOutlierLanes; ++j) lanes[t][j] = _mm512_setzero_ps();
  }
  alignas(32) float values[kOutlierLanes];
  const auto add = [&](int32_t i, int j) {
    const float* line = transposed + static_cast<int64_t>(columns[i + j]) * kTransposedRows;
    const __m512 value = _mm512_set1_ps(values[j]);
#pragma GCC unroll 2
    for (int t = 0; t < kTiles; ++t) {
      lanes[t][j] = _mm512_fmadd_ps(value, _mm512_loadu_ps(line + t * kTransposedRows * layer.columns), lanes[t][j]);
    }
  };
  int32_t i = begin;
  for (; i + kOutlierLanes <= end; i += kOutlierLanes) {
    _mm256_store_ps(values, outlier_values(layer, i, 0xff));
#pragma GCC unroll 8
    for (int j = 0; j < kOutlierLanes; ++j) add(i, j);
  }
  const int left = end - i;
  _mm256_store_ps(values, outlier_values(layer, i, static_cast<__mmask8>((1u << left) - 1u)));
  switch (left) {
    case 7: add(i, 6); [[fallthrough]];
    case 6: add(i, 5); [[fallthrough]];
    case 5: add(i, 4); [[fallthrough]];
    case 4: add(i, 3); [[fallthrough]];
    case 3: add(i, 2); [[fallthrough]];
    case 2: add(i, 1); [[fallthrough]];
    case 1: add(i, 0); [[fallthrough]];
    default: break;
  }
#pragma GCC unroll 2
  for (int t = 0; t < kTiles; ++t) {
#pragma GCC unroll 3
    for (int width = kOutlierLanes / 2; width > 0; width /= 2) {
#pragma GCC unroll 4
      for (int j = 0; j < width; ++j) lanes[t][j] = _mm512_add_ps(lanes[t][j], lanes[t][j + width]);
    }
    result[t] = lanes[t][0];
  }
}

// Rows [m, last) of x, which are rows [lane, ...) of the first of kTiles tiles.
template <int kTiles, class Index>
inline void add_outliers_of_tiles(const LayerView& layer, const Index* columns, const Activations& activations, int64_t m,
                                  int64_t last, int64_t n0, int64_t n1, float* sums, int64_t stride) {
  const int64_t tile = m / kTransposedRows;
  const float* transposed = activations.transposed + tile * kTransposedRows * layer.columns;
  for (int64_t n = n0; n < n1; n += 16) {
    const int count = n1 - n < 16 ? static_cast<int>(n1 - n) : 16;
    __m512 results[kTiles][16];
    for (int i = 0; i < 16; ++i) {
      __m512 result[kTiles];
      for (auto& value : result) value = _mm512_setzero_ps();
      if (i < count) outliers_of_output<kTiles>(layer, columns, transposed, n + i, result);
      for (int t = 0; t < kTiles; ++t) results[t][i] = result[t];
    }
    for (int t = 0; t < kTiles; ++t) {
      transpose_16x16(results[t]);
      for (int i = 0; i < 16; ++i) {
        const int64_t row = (tile + t) * kTransposedRows + i;
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
  for (int64_t m = m0; m < m1;) {
    float* to = sums + (m - m0) * stride;
    const int64_t next = (m / kTransposedRows + 1) * kTransposedRows;
    if (!activations.transposed || m1 - m == 1) {
      add_outliers_of_row(layer, columns, activations.scaled + m * activations.stride, n0, n1, to);
      ++m;
    } else if (next >= m1) {
      add_outliers_of_tiles<1>(layer, columns, activations, m, m1, n0, n1, to, stride);
      m = m1;
    } else {
      const int64_t last = next + kTransposedRows < m1 ? next + kTransposedRows : m1;
      add_outliers_of_tiles<2>(layer, columns, activations, m, last, n0, n1, to, stride);
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
