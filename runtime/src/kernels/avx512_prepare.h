// The pass over x for the AVX-512 families: gathered into stored order, scaled, rounded to int8 a block at a time.
#pragma once

#include "avx512_common.h"

namespace claq {
namespace {

// ---- a row: lanes are columns, four blocks at a time

constexpr int kBlocksAtOnce = 4;

// Byte order of each half of a block that column_of_position asks for.
inline __m512i position_shuffle(int width) {
  const __m128i four = _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
  const __m128i two = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return _mm512_broadcast_i32x4(width == 4 ? four : two);
}

// The features of `blocks` blocks from stored column p on: where they lie, or copied to `buffer`. Scalar copies: they take less time
// than gather instructions, and all of them are made before the first is loaded as a vector.
CLAQ_INLINE const float* load_features(const LayerView& layer, const float* x, int64_t p, int blocks, float* buffer) {
  const int64_t feature = layer.first_feature + p, count = int64_t{blocks} * kBlock;
  if (layer.identity_order && feature + count <= layer.in_features) return x + feature;
  const int32_t* gather = layer.gather + p;
  __m512i any = _mm512_setzero_si512();
  for (int64_t i = 0; i < count; i += 16) any = _mm512_or_si512(any, _mm512_loadu_si512(gather + i));
  if (_mm512_movepi32_mask(any)) {
    for (int64_t i = 0; i < count; ++i) buffer[i] = gather[i] < 0 ? 0.0f : x[gather[i]];
  } else {
    for (int64_t i = 0; i < count; i += 8) {
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j) {
        int64_t from = gather[i + j];
        __asm__("" : "+r"(from));  // else GCC loads indices as vectors, and moves them to where addresses are one by one
        buffer[i + j] = x[from];
      }
    }
  }
  return buffer;
}

// combine over all lanes of each of four vectors.
template <class Combine>
CLAQ_INLINE __m128i reduce_each(const __m512i (&v)[4], Combine combine) {
  const __m512i a = combine(_mm512_unpacklo_epi32(v[0], v[1]), _mm512_unpackhi_epi32(v[0], v[1]));
  const __m512i b = combine(_mm512_unpacklo_epi32(v[2], v[3]), _mm512_unpackhi_epi32(v[2], v[3]));
  __m512i quarters = combine(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
  quarters = combine(quarters, _mm512_shuffle_i64x2(quarters, quarters, 0x4e));
  return _mm512_castsi512_si128(combine(quarters, _mm512_shuffle_i64x2(quarters, quarters, 0xb1)));
}

// Blocks [b, b + count); returns those (as bits) that int8 arithmetic cannot hold.
CLAQ_INLINE __mmask8 prepare_blocks(const LayerView& layer, const float* x, float* scaled, bool quantize, __m512i shuffle,
                                    const PackedPlace& place, int64_t b, int count) {
  const __m512i magnitude_bits = _mm512_set1_epi32(0x7fffffff);
  const auto magnitude = [&](__m512 value) CLAQ_STEP { return _mm512_and_si512(_mm512_castps_si512(value), magnitude_bits); };
  alignas(64) float buffer[kBlocksAtOnce * kBlock];
  const float* features = load_features(layer, x, b * kBlock, count, buffer);
  __m512 low[kBlocksAtOnce], high[kBlocksAtOnce];
  __m512i magnitudes[kBlocksAtOnce];
  unrolled<kBlocksAtOnce>([&](auto i) CLAQ_STEP {
    low[i.kValue] = high[i.kValue] = _mm512_setzero_ps();
    if (i.kValue < count) {
      const int64_t p = (b + i.kValue) * kBlock;
      const float* from = features + i.kValue * kBlock;
      low[i.kValue] = _mm512_mul_ps(_mm512_loadu_ps(layer.scale + p), _mm512_loadu_ps(from));
      high[i.kValue] = _mm512_mul_ps(_mm512_loadu_ps(layer.scale + p + 16), _mm512_loadu_ps(from + 16));
      if (scaled) {
        _mm512_storeu_ps(scaled + p, low[i.kValue]);
        _mm512_storeu_ps(scaled + p + 16, high[i.kValue]);
      }
    }
    // As integers, magnitudes compare as their floats do, and infinities and NaNs are above all finite ones.
    magnitudes[i.kValue] = _mm512_max_epu32(magnitude(low[i.kValue]), magnitude(high[i.kValue]));
  });
  const __m128i bits = reduce_each(magnitudes, [](__m512i p, __m512i q) CLAQ_STEP { return _mm512_max_epu32(p, q); });
  const __m128 largest = _mm_castsi128_ps(bits);
  const __mmask8 nonzero = _mm_test_epi32_mask(bits, bits);
  const __mmask8 special = _mm_cmpge_epu32_mask(bits, _mm_set1_epi32(0x7f800000)) |
                           _mm_mask_cmp_ps_mask(nonzero, largest, _mm_set1_ps(kSmallestMagnitude), _CMP_LT_OQ);
  if (!quantize) return special;
  const __mmask8 kept = static_cast<__mmask8>(nonzero & ~special);
  alignas(16) float inverse[kBlocksAtOnce], scale[kBlocksAtOnce];
  alignas(16) int32_t correction[kBlocksAtOnce];
  _mm_store_ps(inverse, _mm_maskz_div_ps(kept, _mm_set1_ps(127.0f), largest));
  _mm_store_ps(scale, _mm_maskz_div_ps(kept, largest, _mm_set1_ps(127.0f)));
  __m512i sums[kBlocksAtOnce], words[kBlocksAtOnce];
  unrolled<kBlocksAtOnce>([&](auto i) CLAQ_STEP {
    const __m512 factor = _mm512_set1_ps(inverse[i.kValue]);
    const auto mask = static_cast<__mmask16>((kept >> i.kValue) & 1 ? 0xffff : 0);
    const __m512i first = _mm512_maskz_cvtps_epi32(mask, _mm512_mul_ps(low[i.kValue], factor));
    const __m512i second = _mm512_maskz_cvtps_epi32(mask, _mm512_mul_ps(high[i.kValue], factor));
    sums[i.kValue] = _mm512_add_epi32(first, second);
    words[i.kValue] = _mm512_packs_epi32(first, second);
  });
  const __m128i sum = reduce_each(sums, [](__m512i p, __m512i q) CLAQ_STEP { return _mm512_add_epi32(p, q); });
  _mm_store_si128(reinterpret_cast<__m128i*>(correction), _mm_slli_epi32(_mm_sub_epi32(_mm_setzero_si128(), sum), 7));
  // Packing leaves each quarter with its part of both halves of two blocks.
  const __m512i in_order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  unrolled<kBlocksAtOnce / 2>([&](auto i) CLAQ_STEP {
    constexpr int kFirst = 2 * decltype(i)::kValue;
    if (kFirst >= count) return;
    const __m512i bytes = _mm512_shuffle_epi8(
        _mm512_permutexvar_epi32(in_order, _mm512_packs_epi16(words[kFirst], words[kFirst + 1])), shuffle);
    int8_t* quantized = place.quantized + (b + kFirst) * kBlock * place.rows;
    const __mmask16 present = kFirst + 1 < count ? 0xffff : 0xff;
    if (place.rows == 1) {
      _mm512_mask_storeu_epi32(quantized, present, bytes);
    } else {
      const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
      _mm512_mask_i32scatter_epi32(quantized, present, _mm512_mullo_epi32(lanes, _mm512_set1_epi32(static_cast<int>(place.rows))),
                                   bytes, 4);
    }
  });
  for (int i = 0; i < count; ++i) {
    place.scale[(b + i) * place.rows] = scale[i];
    place.correction[(b + i) * place.rows] = correction[i];
  }
  return special;
}

inline bool prepare_row(const LayerView& layer, const float* x, Activations& activations, int64_t row, bool quantize) {
  float* scaled = activations.scaled ? activations.scaled + row * activations.stride : nullptr;
  const PackedPlace place = packed_place(layer, activations, row);
  __mmask8 special = 0;
  for (int s = 0; s < layer.segment_count; ++s) {
    const Segment& segment = layer.segments[s];
    const __m512i shuffle = position_shuffle(segment.width);
    const int64_t end = segment.first_block + segment.blocks;
    int64_t b = segment.first_block;
    for (; b + kBlocksAtOnce <= end; b += kBlocksAtOnce) {
      special |= prepare_blocks(layer, x, scaled, quantize, shuffle, place, b, kBlocksAtOnce);
    }
    if (b < end) special |= prepare_blocks(layer, x, scaled, quantize, shuffle, place, b, static_cast<int>(end - b));
  }
  return special == 0;
}

// ---- a tile of rows: lanes are rows

// Elements [begin, end) of `count` rows, and zeros up to the next multiple of 16 from `begin`, as lines of kRows rows.
template <int kRows>
CLAQ_INLINE void store_lines(const float* const* x, int count, int64_t begin, int64_t end, float* lines) {
  for (int64_t k = begin; k < end; k += 16) {
    const __mmask16 present = first_lanes(end - k);
    __m512 rows[kRows];
    for (int i = 0; i < kRows; ++i) rows[i] = i < count ? _mm512_maskz_loadu_ps(present, x[i] + k) : _mm512_setzero_ps();
    transpose_rows(rows);
    for (int i = 0; i < kRows; ++i) _mm512_store_ps(lines + (k - begin) * kRows + 16 * i, rows[i]);
  }
}

inline void transpose(const LayerView& layer, Activations& activations, int64_t tile) {
  const int64_t first = tile * kRowsAtOnce;
  const float* rows[kRowsAtOnce];
  int count = 0;
  for (; count < kRowsAtOnce && first + count < activations.rows; ++count) {
    rows[count] = activations.scaled + (first + count) * activations.stride;
  }
  store_lines<kRowsAtOnce>(rows, count, 0, layer.columns, activations.transposed + first * layer.columns);
}

// How kRows rows of four vectors, whose lines are in the order of positions, become bytes in the order of PackedPlace.
template <int kRows>
struct LineOrder {
  static constexpr int kInVector = 16 / kRows, kQuarters = kRows / 4;  // lines of a vector, quarters of a line
  int32_t lanes[16];             // after two packs: the lane of each group, quarter of a line and column
  int32_t scales[2][kRows][16];  // by width (4 or not): the scale of each lane, for the vectors of half a block

  constexpr LineOrder() : lanes{}, scales{} {
    for (int lane = 0; lane < 16; ++lane) {
      const int group = lane / 4 / kQuarters, quarter = lane / 4 % kQuarters, position = 4 * group + lane % 4;
      lanes[lane] = 4 * (position % kInVector * kQuarters + quarter) + position / kInVector;
      for (int v = 0; v < kRows; ++v) {
        for (int w = 0; w < 2; ++w) scales[w][v][lane] = column_of_position(w == 0 ? 4 : 2, v * kInVector + lane / kRows);
      }
    }
  }
};

template <int kRows>
alignas(64) constexpr LineOrder<kRows> kLineOrder;

// How lines of kLineRows rows are packed: as PackedPlace says, or sixteen rows as avx512amx.cpp wants them.
template <int kRows>
struct PackedByEight {
  static constexpr int kLineRows = kRows;
  static constexpr bool kBySixteen = false;
};
struct PackedBySixteen {
  static constexpr int kLineRows = 16;
  static constexpr bool kBySixteen = true;
};

// Block b from lines that line_of gives for each of its columns; returns the rows that int8 arithmetic cannot hold, as bits.
template <class Packing, int kWidth, class LineOf>
CLAQ_INLINE __mmask16 prepare_block(const LayerView& layer, const PackedPlace& place, const PackedPlace& next, int64_t b,
                                    float* transposed, LineOf line_of) {
  constexpr int kRows = Packing::kLineRows, kInVector = 16 / kRows, kVectors = kBlock / kInVector;
  const auto& order = kLineOrder<kRows>;
  const __m512 scales[2] = {_mm512_loadu_ps(layer.scale + b * kBlock), _mm512_loadu_ps(layer.scale + b * kBlock + 16)};
  const __m512i magnitude_bits = _mm512_set1_epi32(0x7fffffff);
  __m512 values[kVectors];
  __m512i bits = _mm512_setzero_si512();
  unrolled<kVectors>([&](auto v) CLAQ_STEP {
    constexpr int kFirst = decltype(v)::kValue * kInVector;
    const auto column = [](int i) CLAQ_STEP { return column_of_position(kWidth, kFirst + i); };
    __m512 lines, scale;
    if constexpr (kRows == 16) {
      lines = _mm512_load_ps(line_of(column(0)));
      scale = _mm512_set1_ps(layer.scale[b * kBlock + column(0)]);
    } else {
      if constexpr (kRows == 8) {
        lines = _mm512_insertf32x8(_mm512_castps256_ps512(_mm256_load_ps(line_of(column(0)))), _mm256_load_ps(line_of(column(1))), 1);
      } else {
        lines = _mm512_castps128_ps512(_mm_load_ps(line_of(column(0))));
        lines = _mm512_insertf32x4(lines, _mm_load_ps(line_of(column(1))), 1);
        lines = _mm512_insertf32x4(lines, _mm_load_ps(line_of(column(2))), 2);
        lines = _mm512_insertf32x4(lines, _mm_load_ps(line_of(column(3))), 3);
      }
      scale = _mm512_permutexvar_ps(_mm512_load_si512(order.scales[kWidth != 4][v.kValue % (kVectors / 2)]),
                                    scales[v.kValue / (kVectors / 2)]);
    }
    values[v.kValue] = _mm512_mul_ps(scale, lines);
    if (transposed) {
      unrolled<kInVector>([&](auto i) CLAQ_STEP {
        float* to = transposed + (b * kBlock + column(i.kValue)) * kRows;
        if constexpr (kRows == 16) _mm512_store_ps(to, values[v.kValue]);
        else if constexpr (kRows == 8) _mm256_store_ps(to, _mm512_extractf32x8_ps(values[v.kValue], i.kValue));
        else _mm_store_ps(to, _mm512_extractf32x4_ps(values[v.kValue], i.kValue));
      });
    }
    // As integers, magnitudes compare as their floats do, and infinities and NaNs are above all finite ones.
    bits = _mm512_max_epu32(bits, _mm512_and_si512(_mm512_castps_si512(values[v.kValue]), magnitude_bits));
  });
  // Over the lines of a vector; each row's result is then in all of its lanes.
  const auto over_lines = [](__m512i rows, auto combine) CLAQ_STEP {
    if constexpr (kRows <= 8) rows = combine(rows, _mm512_shuffle_i64x2(rows, rows, 0x4e));
    if constexpr (kRows == 4) rows = combine(rows, _mm512_shuffle_i64x2(rows, rows, 0xb1));
    return rows;
  };
  bits = over_lines(bits, [](__m512i p, __m512i q) CLAQ_STEP { return _mm512_max_epu32(p, q); });
  const __m512 largest = _mm512_castsi512_ps(bits);
  const __mmask16 nonzero = _mm512_test_epi32_mask(bits, bits);
  const __mmask16 special = _mm512_cmpge_epu32_mask(bits, _mm512_set1_epi32(0x7f800000)) |
                            _mm512_mask_cmp_ps_mask(nonzero, largest, _mm512_set1_ps(kSmallestMagnitude), _CMP_LT_OQ);
  const __mmask16 kept = static_cast<__mmask16>(nonzero & ~special);
  const __m512 inverse = _mm512_maskz_div_ps(kept, _mm512_set1_ps(127.0f), largest);
  const __m512 scale = _mm512_maskz_div_ps(kept, largest, _mm512_set1_ps(127.0f));
  __m512i sum = _mm512_setzero_si512();
  [[maybe_unused]] __m512 groups[kVectors / 4];
  unrolled<kVectors / 4>([&](auto four) CLAQ_STEP {
    __m512i rounded[4];
    unrolled<4>([&](auto i) CLAQ_STEP {
      rounded[i.kValue] = _mm512_maskz_cvtps_epi32(kept, _mm512_mul_ps(values[4 * four.kValue + i.kValue], inverse));
      sum = _mm512_add_epi32(sum, rounded[i.kValue]);
    });
    __m512i bytes = _mm512_packs_epi16(_mm512_packs_epi32(rounded[0], rounded[1]), _mm512_packs_epi32(rounded[2], rounded[3]));
    if constexpr (kRows < 16) bytes = _mm512_permutexvar_epi32(_mm512_load_si512(order.lanes), bytes);
    // A quarter holds the bytes of four rows for one column after the other; they become those of four columns for each row.
    bytes = _mm512_shuffle_epi8(
        bytes, _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15)));
    const int64_t group = b * kGroupsPerBlock + four.kValue * kInVector;
    int8_t* to = place.quantized + group * 4 * place.rows;
    if constexpr (Packing::kBySixteen) {
      groups[four.kValue] = _mm512_castsi512_ps(bytes);
    } else if constexpr (kRows == 16) {
      _mm256_mask_storeu_epi32(to, first_lanes(place.rows), _mm512_castsi512_si256(bytes));
      _mm256_mask_storeu_epi32(next.quantized + group * 4 * next.rows, first_lanes(next.rows), _mm512_extracti64x4_epi64(bytes, 1));
    } else {
      // Rows that are not there are left out.
      const int rows = static_cast<int>(first_lanes(place.rows)) * (kRows == 8 ? 0x101 : 0x1111);
      _mm512_mask_storeu_epi32(to, first_lanes(place.rows * kInVector),
                               _mm512_maskz_compress_epi32(static_cast<__mmask16>(rows), bytes));
    }
  });
  if constexpr (Packing::kBySixteen) {
    transpose_rows(groups);
    unrolled<kGroupsPerBlock>([&](auto i) CLAQ_STEP {
      _mm512_store_ps(reinterpret_cast<float*>(place.quantized + b * kBlock * kRows + 64 * i.kValue), groups[i.kValue]);
    });
    _mm512_storeu_ps(place.scale + b * kRows, scale);
    return special;
  }
  sum = over_lines(sum, [](__m512i p, __m512i q) CLAQ_STEP { return _mm512_add_epi32(p, q); });
  const __m512i correction = _mm512_slli_epi32(_mm512_sub_epi32(_mm512_setzero_si512(), sum), 7);
  const __mmask16 rows = first_lanes(place.rows);
  _mm256_mask_storeu_ps(place.scale + b * place.rows, rows, _mm512_castps512_ps256(scale));
  _mm256_mask_storeu_epi32(place.correction + b * place.rows, rows, _mm512_castsi512_si256(correction));
  if constexpr (kRows == 16) {
    const __mmask16 next_rows = first_lanes(next.rows);
    _mm256_mask_storeu_ps(next.scale + b * next.rows, next_rows, _mm512_extractf32x8_ps(scale, 1));
    _mm256_mask_storeu_epi32(next.correction + b * next.rows, next_rows, _mm512_extracti64x4_epi64(correction, 1));
  }
  return special;
}

template <class Packing, int kWidth>
__mmask16 prepare_segment(const LayerView& layer, const float* const* x, int count, const Range& blocks, const PackedPlace& place,
                          const PackedPlace& next, const float* features, float* transposed) {
  constexpr int kRows = Packing::kLineRows;
  __mmask16 special = 0;
  for (int64_t b = blocks.begin; b < blocks.end; ++b) {
    if (layer.identity_order) {
      alignas(64) float lines[kBlock * kRows];
      const int64_t feature = layer.first_feature + b * kBlock, left = layer.in_features - feature;
      if (left < kBlock) {
        for (int i = 0; i < kBlock * kRows; i += 16) _mm512_store_ps(lines + i, _mm512_setzero_ps());
      }
      store_lines<kRows>(x, count, feature, left < kBlock ? layer.in_features : feature + kBlock, lines);
      special |= prepare_block<Packing, kWidth>(layer, place, next, b, transposed,
                                                [&](int column) CLAQ_STEP { return lines + column * kRows; });
    } else {
      const int32_t* gather = layer.gather + b * kBlock;
      special |= prepare_block<Packing, kWidth>(layer, place, next, b, transposed,
                                                [&](int column) CLAQ_STEP { return features + int64_t{gather[column]} * kRows; });
    }
  }
  return special;
}

// Lanes are rows of x here: gathering is loading their lines, and little is summed across lanes.
template <class Packing>
void prepare_lines(const LayerView& layer, const float* const* x, Activations& activations, int64_t first, int64_t first_block,
                   int64_t last_block, float* features, uint8_t* exact) {
  constexpr int kRows = Packing::kLineRows;
  const int64_t left = activations.rows - first;
  const int count = left < kRows ? static_cast<int>(left) : kRows;
  if (!layer.identity_order) {
    features += 16;
    for (int i = 1; i <= kRows; ++i) features[-i] = 0.0f;  // line -1, for padding
    store_lines<kRows>(x, count, 0, layer.in_features, features);
  }
  // Without rows for a second packed tile nothing is stored there, and it must only not be a null pointer.
  const PackedPlace place = packed_place(layer, activations, first);
  PackedPlace next = place;
  next.rows = 0;
  if (count > kPackedRows) next = packed_place(layer, activations, first + kPackedRows);
  float* transposed = activations.transposed ? activations.transposed + first * layer.columns : nullptr;
  __mmask16 special = 0;
  for (int s = 0; s < layer.segment_count; ++s) {
    const auto segment = layer.segments[s].width == 4 ? prepare_segment<Packing, 4> : prepare_segment<Packing, 2>;
    special |= segment(layer, x, count, overlap(layer.segments[s], first_block, last_block), place, next, features, transposed);
  }
  for (int i = 0; i < count; ++i) exact[i] = (special >> i) & 1;
}

inline void prepare_tile(const LayerView& layer, const float* const* x, Activations& activations, int64_t first, int64_t first_block,
                         int64_t last_block, float* features, uint8_t* exact) {
  const auto lines = activations.line_rows == 4   ? prepare_lines<PackedByEight<4>>
                     : activations.line_rows == 8 ? prepare_lines<PackedByEight<8>>
                                                  : prepare_lines<PackedByEight<16>>;
  lines(layer, x, activations, first, first_block, last_block, features, exact);
}

}  // namespace
}  // namespace claq
