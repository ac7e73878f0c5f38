// What the AVX2 families share: activations, the epilogue and 16-bit conversions.
//
// Included only by files that are compiled for AVX2, FMA and F16C. Everything is in an unnamed namespace and nothing of the
// C++ library is used, so that no AVX2 instance of a shared inline function can end up in other code.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "family.h"
#include "layout.h"
#include "lines.h"
#include "unrolled.h"

namespace claq {
namespace {

// All bits of the first `count` of eight lanes.
inline __m256i lane_mask(int64_t count) {
  const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const int32_t clamped = count < 0 ? 0 : count > 8 ? 8 : static_cast<int32_t>(count);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(clamped), lanes);
}

inline void clear_sums(int64_t rows, int64_t count, float* sums, int64_t stride) {
  for (int64_t m = 0; m < rows; ++m) {
    for (int64_t n = 0; n < count; n += 8) _mm256_storeu_ps(sums + m * stride + n, _mm256_setzero_ps());
  }
}

// r[i] lane j becomes r[j] lane i.
CLAQ_INLINE void transpose_lines(__m128 (&r)[4]) { _MM_TRANSPOSE4_PS(r[0], r[1], r[2], r[3]); }
CLAQ_INLINE void transpose_lines(__m256 (&r)[8]) {
  __m256 t[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x20);
    t[i + 4] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x31);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) r[i] = t[i];
}

// ---- int8 activations
//
// An inner step multiplies each output's lane of 32 bits: with the dot-product instruction four bytes, a group, in one step;
// without it a group in two steps of two 16-bit numbers, of the group's positions 0 and 2, then 1 and 3. (Products of
// bytes are summed in 16 bits, saturating: two of 255 * 127 do not fit. 16-bit operands are exact, and no slower, because
// a product of bytes needs widening, and a sign moved from one operand to the other.)
#if defined(__AVXVNNI__)
constexpr int kSteps = kGroupsPerBlock;  // of a block
#else
constexpr int kSteps = 2 * kGroupsPerBlock;
#endif
constexpr int kActivationBytes = kSteps * 4 / kBlock;
constexpr int kRowsAtOnce = 8;    // that prepare_tile makes
constexpr int kPackedTileRows = 4;  // of a tile of packed rows: [block][step][row of the tile] lanes of 32 bits

// Where int8 activations of a row begin. The tiles of packed rows are always whole, except that a row alone is not interleaved.
struct PackedRow {
  int64_t rows;         // of its tile
  int32_t* lanes;       // step s of block b: + (b * kSteps + s) * rows
  float* scale;         // block b: + b * rows
  int32_t* correction;  // likewise
};

inline PackedRow packed_row(const LayerView& layer, const Activations& activations, int64_t row) {
  const int64_t rows = activations.alone ? 1 : kPackedTileRows;
  const int64_t first = row / rows * rows, lane = row - first;
  auto* lanes = reinterpret_cast<int32_t*>(activations.quantized);
  return {rows, lanes + first * layer.blocks * kSteps + lane, activations.block_scale + first * layer.blocks + lane,
          activations.block_correction + first * layer.blocks + lane};
}

inline __m256 load_scaled(const LayerView& layer, const float* x, int64_t p) {
  const __m256 scale = _mm256_loadu_ps(layer.scale + p);
  __m256 values;
  if (layer.identity_order) {
    const int64_t feature = layer.first_feature + p, left = layer.in_features - feature;
    values = left >= 8 ? _mm256_loadu_ps(x + feature)
                       : left > 0 ? _mm256_maskload_ps(x + feature, lane_mask(left)) : _mm256_setzero_ps();
  } else {
    const __m256i index = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(layer.gather + p));
    const __m256i present = _mm256_cmpgt_epi32(index, _mm256_set1_epi32(-1));
    values = _mm256_mask_i32gather_ps(_mm256_setzero_ps(), x, index, _mm256_castsi256_ps(present), 4);
  }
  return _mm256_mul_ps(scale, values);
}

inline uint32_t largest_lane(__m256i values) {
  __m128i m = _mm_max_epu32(_mm256_castsi256_si128(values), _mm256_extracti128_si256(values, 1));
  m = _mm_max_epu32(m, _mm_shuffle_epi32(m, 0x4e));
  m = _mm_max_epu32(m, _mm_shuffle_epi32(m, 0xb1));
  return static_cast<uint32_t>(_mm_cvtsi128_si32(m));
}

inline int32_t sum_of_lanes(__m256i values) {
  __m128i s = _mm_add_epi32(_mm256_castsi256_si128(values), _mm256_extracti128_si256(values, 1));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1));
  return _mm_cvtsi128_si32(s);
}

// Bytes of a 16-byte half of a block in the order of its steps.
inline __m256i step_shuffle(int width) {
  const __m128i positions = width == 4 ? _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15)
                                       : _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m128i steps = kActivationBytes == 1 ? _mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)
                                              : _mm_setr_epi8(0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15);
  return _mm256_broadcastsi128_si256(_mm_shuffle_epi8(positions, steps));
}

// The lanes of a block's steps from its 32 bytes in the order of steps.
inline void store_steps(__m256i bytes, int32_t* lanes, int64_t rows) {
  alignas(32) int32_t steps[kSteps];
  auto* to = reinterpret_cast<__m256i*>(rows == 1 ? lanes : steps);
  if constexpr (kActivationBytes == 1) {
    _mm256_storeu_si256(to, bytes);
  } else {
    _mm256_storeu_si256(to, _mm256_cvtepi8_epi16(_mm256_castsi256_si128(bytes)));
    _mm256_storeu_si256(to + 1, _mm256_cvtepi8_epi16(_mm256_extracti128_si256(bytes, 1)));
  }
  if (rows == 1) return;
  for (int s = 0; s < kSteps; ++s) lanes[s * rows] = steps[s];
}

inline bool prepare_row(const LayerView& layer, const float* x, Activations& activations, int64_t row, bool quantize) {
  float* scaled = activations.scaled ? activations.scaled + row * activations.stride : nullptr;
  const PackedRow place = packed_row(layer, activations, row);
  const __m256i magnitude_bits = _mm256_set1_epi32(0x7fffffff);
  bool exact = false;
  for (int s = 0; s < layer.segment_count; ++s) {
    const Segment& segment = layer.segments[s];
    const __m256i shuffle = step_shuffle(segment.width);
    for (int64_t b = segment.first_block; b < segment.first_block + segment.blocks; ++b) {
      __m256 values[4];
      __m256i bits = _mm256_setzero_si256();
      for (int i = 0; i < 4; ++i) {
        values[i] = load_scaled(layer, x, b * kBlock + 8 * i);
        if (scaled) _mm256_storeu_ps(scaled + b * kBlock + 8 * i, values[i]);
        bits = _mm256_max_epu32(bits, _mm256_and_si256(_mm256_castps_si256(values[i]), magnitude_bits));
      }
      // As integers, magnitudes compare as their floats do, and infinities and NaNs are above all finite ones.
      const uint32_t top = largest_lane(bits);
      const float largest = _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(static_cast<int32_t>(top))));
      const bool special = top >= 0x7f800000u || (top != 0 && largest < kSmallestMagnitude);
      exact |= special;
      if (!quantize) continue;
      const bool zero = special || top == 0;
      const __m256 inverse = _mm256_set1_ps(zero ? 0.0f : 127.0f / largest);
      const __m256i kept = _mm256_set1_epi32(zero ? 0 : -1);
      __m256i rounded[4];
      for (int i = 0; i < 4; ++i) rounded[i] = _mm256_and_si256(kept, _mm256_cvtps_epi32(_mm256_mul_ps(values[i], inverse)));
      // Packing works within 128-bit halves; the permutation puts the fours back in order.
      const __m256i packed = _mm256_packs_epi16(_mm256_packs_epi32(rounded[0], rounded[1]), _mm256_packs_epi32(rounded[2], rounded[3]));
      const __m256i bytes = _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
      store_steps(_mm256_shuffle_epi8(bytes, shuffle), place.lanes + b * kSteps * place.rows, place.rows);
      place.scale[b * place.rows] = zero ? 0.0f : largest / 127.0f;
      place.correction[b * place.rows] = -128 * sum_of_lanes(_mm256_add_epi32(_mm256_add_epi32(rounded[0], rounded[1]),
                                                                              _mm256_add_epi32(rounded[2], rounded[3])));
    }
  }
  return !exact;
}

// The lanes of one step from the rounded activations of its positions.
CLAQ_INLINE __m256i step_lanes(const __m256i (&rounded)[4], int step_of_group) {
  const auto pair = [](__m256i low, __m256i high) { return _mm256_blend_epi16(low, _mm256_slli_epi32(high, 16), 0xaa); };
  if constexpr (kActivationBytes == 2) return pair(rounded[step_of_group], rounded[step_of_group + 2]);
  const __m256i even = pair(rounded[0], rounded[2]), odd = pair(rounded[1], rounded[3]);
  return _mm256_blendv_epi8(even, _mm256_slli_epi16(odd, 8), _mm256_set1_epi16(static_cast<int16_t>(0xff00)));
}

// Elements [begin, end) of `count` rows as lines, one element of kRowsAtOnce rows each.
inline void store_lines(const float* const* x, int count, int64_t begin, int64_t end, float* lines) {
  for (int64_t k = begin; k < end; k += 8) {
    const int64_t present = end - k;
    __m256 rows[8];
    for (int i = 0; i < 8; ++i) {
      rows[i] = i >= count ? _mm256_setzero_ps()
                           : present >= 8 ? _mm256_loadu_ps(x[i] + k) : _mm256_maskload_ps(x[i] + k, lane_mask(present));
    }
    transpose_lines(rows);
    for (int i = 0; i < 8 && i < present; ++i) _mm256_store_ps(lines + (k - begin + i) * kRowsAtOnce, rows[i]);
  }
}

// Lanes are rows of x here: gathering is loading lines of the transposed rows, and nothing is summed across lanes.
inline void prepare_tile(const LayerView& layer, const float* const* x, Activations& activations, int64_t first, int64_t first_block,
                         int64_t last_block, float* features, uint8_t* exact) {
  const int64_t left = activations.rows - first;
  const int count = left < kRowsAtOnce ? static_cast<int>(left) : kRowsAtOnce;
  const Range needed = features_of(layer, first_block, last_block);
  store_lines(x, count, needed.begin, needed.end, features + needed.begin * kRowsAtOnce);
  // Two packed tiles. The second is whole as well where it has rows, and where it has none nothing is stored there.
  const PackedRow place = packed_row(layer, activations, first);
  const PackedRow next = count > kPackedTileRows ? packed_row(layer, activations, first + kPackedTileRows) : place;
  const auto store = [&](int32_t* to, int32_t* to_next, __m256i lanes) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(lanes));
    if (count > kPackedTileRows) _mm_storeu_si128(reinterpret_cast<__m128i*>(to_next), _mm256_extracti128_si256(lanes, 1));
  };
  const __m256i magnitude_bits = _mm256_set1_epi32(0x7fffffff);
  const __m256i smallest = _mm256_castps_si256(_mm256_set1_ps(kSmallestMagnitude));
  float* transposed = activations.transposed ? activations.transposed + first * layer.columns : nullptr;
  __m256i all_special = _mm256_setzero_si256();
  alignas(32) float block[kBlock][kRowsAtOnce];
  for (int s = 0; s < layer.segment_count; ++s) {
    const Segment& segment = layer.segments[s];
    const Range blocks = overlap(segment, first_block, last_block);
    for (int64_t b = blocks.begin; b < blocks.end; ++b) {
      __m256i bits = _mm256_setzero_si256();
      for (int i = 0; i < kBlock; ++i) {
        const int64_t p = b * kBlock + i;
        const int32_t feature = layer.gather[p];
        const __m256 line = feature < 0 ? _mm256_setzero_ps() : _mm256_load_ps(features + int64_t{feature} * kRowsAtOnce);
        const __m256 value = _mm256_mul_ps(_mm256_set1_ps(layer.scale[p]), line);
        _mm256_store_ps(block[i], value);
        if (transposed) {
          if (activations.line_rows == 4) _mm_store_ps(transposed + p * 4, _mm256_castps256_ps128(value));
          else _mm256_store_ps(transposed + p * 8, value);
        }
        bits = _mm256_max_epi32(bits, _mm256_and_si256(_mm256_castps_si256(value), magnitude_bits));
      }
      const __m256 largest = _mm256_castsi256_ps(bits);
      const __m256i zero = _mm256_cmpeq_epi32(bits, _mm256_setzero_si256());
      const __m256i special = _mm256_or_si256(_mm256_cmpgt_epi32(bits, _mm256_set1_epi32(0x7f7fffff)),
                                              _mm256_andnot_si256(zero, _mm256_cmpgt_epi32(smallest, bits)));
      const __m256i dropped = _mm256_or_si256(zero, special);
      all_special = _mm256_or_si256(all_special, special);
      const auto keep = [&](__m256 values) { return _mm256_andnot_ps(_mm256_castsi256_ps(dropped), values); };
      const __m256 inverse = keep(_mm256_div_ps(_mm256_set1_ps(127.0f), largest));
      __m256i sum = _mm256_setzero_si256();
      const int64_t first_lane = b * kSteps * kPackedTileRows;
      for (int g = 0; g < kGroupsPerBlock; ++g) {
        __m256i rounded[4];
        for (int j = 0; j < 4; ++j) {
          const __m256 value = _mm256_load_ps(block[column_of_position(segment.width, 4 * g + j)]);
          rounded[j] = _mm256_andnot_si256(dropped, _mm256_cvtps_epi32(_mm256_mul_ps(value, inverse)));
          sum = _mm256_add_epi32(sum, rounded[j]);
        }
        for (int i = 0; i < kSteps / kGroupsPerBlock; ++i) {
          const int64_t lane = first_lane + (g * (kSteps / kGroupsPerBlock) + i) * kPackedTileRows;
          store(place.lanes + lane, next.lanes + lane, step_lanes(rounded, i));
        }
      }
      const int64_t at = b * kPackedTileRows;
      store(reinterpret_cast<int32_t*>(place.scale + at), reinterpret_cast<int32_t*>(next.scale + at),
            _mm256_castps_si256(keep(_mm256_div_ps(largest, _mm256_set1_ps(127.0f)))));
      store(place.correction + at, next.correction + at, _mm256_slli_epi32(_mm256_sub_epi32(_mm256_setzero_si256(), sum), 7));
    }
  }
  const int mask = _mm256_movemask_ps(_mm256_castsi256_ps(all_special));
  for (int i = 0; i < count; ++i) exact[i] = static_cast<uint8_t>((mask >> i) & 1);
}

inline void transpose(const LayerView& layer, Activations& activations, int64_t tile) {
  const int64_t first = tile * kRowsAtOnce;
  const float* rows[kRowsAtOnce];
  int count = 0;
  for (; count < kRowsAtOnce && first + count < activations.rows; ++count) {
    rows[count] = activations.scaled + (first + count) * activations.stride;
  }
  store_lines(rows, count, 0, layer.columns, activations.transposed + first * layer.columns);
}

// ---- epilogue and conversions

inline void finish_row(const LayerView& layer, int64_t n0, int64_t n1, const float* sums, float* y) {
  int64_t n = n0;
  for (; n + 8 <= n1; n += 8) {
    const __m256 scale = _mm256_loadu_ps(layer.row_scale + n), sum = _mm256_loadu_ps(sums + n - n0);
    _mm256_storeu_ps(y + n - n0, layer.bias ? _mm256_fmadd_ps(scale, sum, _mm256_loadu_ps(layer.bias + n)) : _mm256_mul_ps(scale, sum));
  }
  if (n == n1) return;
  const __m256i mask = lane_mask(n1 - n);
  const __m256 scale = _mm256_maskload_ps(layer.row_scale + n, mask), sum = _mm256_loadu_ps(sums + n - n0);
  const __m256 result = layer.bias ? _mm256_fmadd_ps(scale, sum, _mm256_maskload_ps(layer.bias + n, mask)) : _mm256_mul_ps(scale, sum);
  _mm256_maskstore_ps(y + n - n0, mask, result);
}

inline void half_row_to_float(const uint16_t* from, float* to, int64_t count) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
  }
  for (; i < count; ++i) to[i] = _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(from[i])));
}

inline void float_row_to_half(const float* from, uint16_t* to, int64_t count) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
  }
  for (; i < count; ++i) {
    to[i] = static_cast<uint16_t>(_mm_cvtsi128_si32(_mm_cvtps_ph(_mm_set_ss(from[i]), _MM_FROUND_TO_NEAREST_INT)));
  }
}

}  // namespace
}  // namespace claq
