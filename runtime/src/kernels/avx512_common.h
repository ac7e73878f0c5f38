// What the AVX-512 families share: tails, transpositions, the epilogue and 16-bit conversions.
//
// Included only by files that are compiled for AVX-512 F, BW, DQ and VL. Everything is in an unnamed namespace and nothing
// of the C++ library is used, so that no AVX-512 instance of a shared inline function can end up in other code.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "family.h"
#include "layout.h"
#include "unrolled.h"

namespace claq {
namespace {

constexpr int64_t kRowsAtOnce = 16;  // of x, that are made and transposed together

// None if `count` is below 0.
inline __mmask16 first_lanes(int64_t count) {
  return count >= 16 ? __mmask16{0xffff} : count <= 0 ? __mmask16{0} : static_cast<__mmask16>((1u << count) - 1u);
}

// Calls tile(Constant<left>) for 0 < left <= kMost, nothing for 0.
template <int kMost, class Tile>
inline void for_tail(int64_t left, const Tile& tile) {
  if constexpr (kMost > 0) {
    if (left == kMost) tile(Constant<kMost>{});
    else for_tail<kMost - 1>(left, tile);
  }
}

// Calls use(segment, Constant<its width>) for each segment of the layer.
template <class Use>
CLAQ_INLINE void for_segments(const LayerView& layer, const Use& use) {
  for (int s = 0; s < layer.segment_count; ++s) {
    const Segment& segment = layer.segments[s];
    switch (segment.width) {
      case 4: use(segment, Constant<4>{}); break;
      case 3: use(segment, Constant<3>{}); break;
      default: use(segment, Constant<2>{}); break;
    }
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

// ---- lines: the values of kRows rows of x at one feature or column, side by side; a vector holds 16 / kRows of them

// The 4 x 4 transposition of the quarters of four vectors.
CLAQ_INLINE void transpose_quarters(__m512 a, __m512 b, __m512 c, __m512 d, __m512 (&result)[4]) {
  const __m512 low[2] = {_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(c, d, 0x44)};
  const __m512 high[2] = {_mm512_shuffle_f32x4(a, b, 0xee), _mm512_shuffle_f32x4(c, d, 0xee)};
  result[0] = _mm512_shuffle_f32x4(low[0], low[1], 0x88);
  result[1] = _mm512_shuffle_f32x4(low[0], low[1], 0xdd);
  result[2] = _mm512_shuffle_f32x4(high[0], high[1], 0x88);
  result[3] = _mm512_shuffle_f32x4(high[0], high[1], 0xdd);
}

// In each quarter, the 4 x 4 transposition of four vectors.
CLAQ_INLINE void transpose_in_quarters(__m512 a, __m512 b, __m512 c, __m512 d, __m512 (&result)[4]) {
  const __m512d low[2] = {_mm512_castps_pd(_mm512_unpacklo_ps(a, b)), _mm512_castps_pd(_mm512_unpacklo_ps(c, d))};
  const __m512d high[2] = {_mm512_castps_pd(_mm512_unpackhi_ps(a, b)), _mm512_castps_pd(_mm512_unpackhi_ps(c, d))};
  result[0] = _mm512_castpd_ps(_mm512_unpacklo_pd(low[0], low[1]));
  result[1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low[0], low[1]));
  result[2] = _mm512_castpd_ps(_mm512_unpacklo_pd(high[0], high[1]));
  result[3] = _mm512_castpd_ps(_mm512_unpackhi_pd(high[0], high[1]));
}

// Between rows and lines there are parts: quarter j of part 4 * q + i is feature 4 * j + i of rows 4 * q to 4 * q + 3. Part t of these
// four has the features 4 * j + s * 16 / kRows and those beside them in a vector.
template <int kRows>
constexpr int part_of_lines(int s, int t) {
  return 4 * (t % (kRows / 4)) + s * (16 / kRows) + t / (kRows / 4);
}

// Sixteen features of kRows rows become kRows vectors of lines.
template <int kRows>
CLAQ_INLINE void transpose_rows(__m512 (&r)[kRows]) {
  __m512 part[kRows], four[4];
  for (int q = 0; q < kRows; q += 4) {
    transpose_in_quarters(r[q], r[q + 1], r[q + 2], r[q + 3], four);
    for (int i = 0; i < 4; ++i) part[q + i] = four[i];
  }
  for (int s = 0; s < kRows / 4; ++s) {
    const auto source = [&](int t) CLAQ_STEP { return part[part_of_lines<kRows>(s, t)]; };
    transpose_quarters(source(0), source(1), source(2), source(3), four);
    for (int j = 0; j < 4; ++j) r[j * (kRows / 4) + s] = four[j];
  }
}

// The way back.
template <int kRows>
CLAQ_INLINE void transpose_lines(__m512 (&r)[kRows]) {
  __m512 part[kRows], four[4];
  for (int s = 0; s < kRows / 4; ++s) {
    transpose_quarters(r[s], r[kRows / 4 + s], r[2 * (kRows / 4) + s], r[3 * (kRows / 4) + s], four);
    for (int t = 0; t < 4; ++t) part[part_of_lines<kRows>(s, t)] = four[t];
  }
  for (int q = 0; q < kRows; q += 4) {
    transpose_in_quarters(part[q], part[q + 1], part[q + 2], part[q + 3], four);
    for (int i = 0; i < 4; ++i) r[q + i] = four[i];
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
