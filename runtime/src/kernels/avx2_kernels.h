// The AVX2 families: one header, compiled twice, with and without the VNNI dot product on 256-bit registers.
//
// All work goes through panels: the centroids of a stripe of outputs and a few blocks are decoded into the first-level cache
// and multiplied by every row of x. Everything is in an unnamed namespace and nothing of the C++ library is used, so that
// no AVX2 instance of a shared inline function can end up in other code.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "family.h"
#include "layout.h"

namespace claq {
namespace {

constexpr int kVectors = 4;  // of eight outputs: a tile
constexpr int kTile = 8 * kVectors;
constexpr int kPanelParts = 16;           // blocks times tiles of an int8 panel: 16 KiB
constexpr int kFloatPanelParts = 4;       // of a float32 panel: 16 KiB
constexpr int64_t kPanelSums = 4 * 1024;  // sums that a panel may work on
constexpr int kBlocksAhead = 4;           // how far ahead code words are fetched

// All bits of the first `count` of eight lanes.
inline __m256i lane_mask(int64_t count) {
  const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const int32_t clamped = count < 0 ? 0 : count > 8 ? 8 : static_cast<int32_t>(count);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(clamped), lanes);
}

inline __m256i load_words(const uint32_t* words, int64_t count) {
  if (count >= 8) return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words));
  return _mm256_maskload_epi32(reinterpret_cast<const int*>(words), lane_mask(count));
}

inline void clear_sums(int64_t rows, int64_t count, float* sums, int64_t stride) {
  for (int64_t m = 0; m < rows; ++m) {
    for (int64_t n = 0; n < count; n += 8) _mm256_storeu_ps(sums + m * stride + n, _mm256_setzero_ps());
  }
}

// ---- activations

inline __m256 load_scaled(const LayerView& layer, const float* x, int64_t p) {
  const __m256 scale = _mm256_loadu_ps(layer.scale + p);
  __m256 values;
  if (layer.identity_order) {
    const int64_t left = layer.in_features - p;
    values = left >= 8 ? _mm256_loadu_ps(x + p) : left > 0 ? _mm256_maskload_ps(x + p, lane_mask(left)) : _mm256_setzero_ps();
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

inline bool prepare_row(const LayerView& layer, const float* x, Activations& activations, int64_t row, bool quantize) {
  float* scaled = activations.scaled ? activations.scaled + row * activations.stride : nullptr;
  int8_t* quantized = quantize ? activations.quantized + row * activations.stride : nullptr;
  float* block_scale = activations.block_scale + row * activations.block_stride;
  int32_t* correction = activations.block_correction + row * activations.block_stride;
  const __m256i magnitude_bits = _mm256_set1_epi32(0x7fffffff);
  bool exact = false;
  for (int s = 0; s < layer.segment_count; ++s) {
    const Segment& segment = layer.segments[s];
    // Byte order of a 16-byte half of a block that column_of_position asks for.
    const __m256i shuffle = _mm256_broadcastsi128_si256(
        segment.width == 4 ? _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15)
                           : _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
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
      exact |= top >= 0x7f800000u || (top != 0 && largest < kSmallestMagnitude);
      if (!quantize) continue;
      const __m256 inverse = _mm256_set1_ps(top == 0 ? 0.0f : 127.0f / largest);
      __m256i rounded[4];
      for (int i = 0; i < 4; ++i) rounded[i] = _mm256_cvtps_epi32(_mm256_mul_ps(values[i], inverse));
      // Packing works within 128-bit halves; the permutation puts the fours back in order.
      const __m256i packed = _mm256_packs_epi16(_mm256_packs_epi32(rounded[0], rounded[1]), _mm256_packs_epi32(rounded[2], rounded[3]));
      const __m256i bytes = _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(quantized + b * kBlock), _mm256_shuffle_epi8(bytes, shuffle));
      block_scale[b] = largest / 127.0f;
      correction[b] = -128 * sum_of_lanes(_mm256_add_epi32(_mm256_add_epi32(rounded[0], rounded[1]),
                                                           _mm256_add_epi32(rounded[2], rounded[3])));
    }
  }
  return !exact;
}

// ---- panels

// Outputs [n0, n1) and blocks [first_block, first_block + blocks); tile after tile, within a tile block after block.
struct PanelPlace {
  int64_t first_block, blocks, n0, n1;
};

// Calls body(segment, block) for each block of the place.
template <class Body>
inline void for_each_block(const LayerView& layer, const PanelPlace& place, const Body& body) {
  for (int s = 0; s < layer.segment_count; ++s) {
    const Segment& segment = layer.segments[s];
    for (int64_t block = place.first_block; block < place.first_block + place.blocks; ++block) {
      if (block >= segment.first_block && block < segment.first_block + segment.blocks) body(segment, block);
    }
  }
}

// Calls body(place) for panels of at most `parts` tiles times blocks, which together cover the outputs and all blocks.
template <class Body>
inline void for_each_panel(const LayerView& layer, int64_t rows, int64_t n0, int64_t n1, int64_t parts, const Body& body) {
  // Few rows: wide and shallow, because decoding dominates and wants long rows of codes. Many: narrow and deep.
  int64_t tiles = kPanelSums / rows / kTile;
  tiles = tiles < 1 ? 1 : tiles > parts ? parts : tiles;
  for (int64_t n = n0; n < n1; n += tiles * kTile) {
    PanelPlace place{0, 0, n, n1 - n < tiles * kTile ? n1 : n + tiles * kTile};
    for (; place.first_block < layer.blocks; place.first_block += place.blocks) {
      const int64_t left = layer.blocks - place.first_block;
      place.blocks = left < parts / tiles ? left : parts / tiles;
      body(place);
    }
  }
}

inline const uint32_t* block_codes(const LayerView& layer, const Segment& segment, int64_t block) {
  return layer.codes + (segment.first_row + (block - segment.first_block) * segment.width) * layer.out_features;
}

inline const uint8_t* block_table(const LayerView& layer, const Segment& segment, int64_t block) {
  return layer.table + segment.table_offset + (((block - segment.first_block) * kBlock) << segment.width);
}

// ---- int8

// Without the dot-product instruction centroids are signed again: bytes times bytes are summed in 16 bits there, which two
// products of offset centroids would overflow.
#if defined(__AVXVNNI__)
constexpr bool kSignedCentroids = false;
inline __m256i begin(int32_t correction) { return _mm256_set1_epi32(correction); }
inline __m256i dot(__m256i sum, __m256i w, __m256i x) { return _mm256_dpbusd_avx_epi32(sum, w, x); }
#else
constexpr bool kSignedCentroids = true;
inline __m256i begin(int32_t) { return _mm256_setzero_si256(); }
inline __m256i dot(__m256i sum, __m256i w, __m256i x) {
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
  return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
#endif

inline __m256i load_entries(const uint8_t* table) {
  __m128i entries = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
  if (kSignedCentroids) entries = _mm_xor_si128(entries, _mm_set1_epi8(-128));
  return _mm256_broadcastsi128_si256(entries);
}

inline void store(uint8_t* panel, int group, int vector, __m256i value) {
  _mm256_store_si256(reinterpret_cast<__m256i*>(panel + (group * kVectors + vector) * 32), value);
}

// Four columns share a 16-byte table.
inline void decode_2(const uint8_t* table, const __m256i (&words)[kVectors][2], uint8_t* panel) {
  const __m256i mask = _mm256_set1_epi8(3), offset = _mm256_set1_epi32(0x0c080400);
  for (int group = 0; group < kGroupsPerBlock; ++group) {
    const __m256i entries = load_entries(table + 16 * group);
    for (int v = 0; v < kVectors; ++v) {
      const __m256i low = _mm256_srli_epi32(words[v][group / 4], 2 * (group % 4));
      store(panel, group, v, _mm256_shuffle_epi8(entries, _mm256_or_si256(_mm256_and_si256(low, mask), offset)));
    }
  }
}

// Two columns share a 16-byte table.
inline void decode_3(const uint8_t* table, const __m256i (&words)[kVectors][3], uint8_t* panel) {
  const __m256i two_bits = _mm256_set1_epi8(3), one_bit = _mm256_set1_epi8(4), offset = _mm256_set1_epi32(0x08000800);
  const __m256i low_halves = _mm256_set1_epi32(0x000f000f), high_halves = _mm256_set1_epi32(0x0f000f00);
  for (int half = 0; half < 2; ++half) {
    const __m256i spread = _mm256_broadcastsi128_si256(
        half ? _mm_setr_epi8(2, 2, 3, 3, 6, 6, 7, 7, 10, 10, 11, 11, 14, 14, 15, 15)
             : _mm_setr_epi8(0, 0, 1, 1, 4, 4, 5, 5, 8, 8, 9, 9, 12, 12, 13, 13));
    for (int v = 0; v < kVectors; ++v) {
      // Four bits a byte, the third bits of its column in the four groups of the word.
      const __m256i bytes = _mm256_shuffle_epi8(words[v][2], spread);
      const __m256i third = _mm256_or_si256(_mm256_and_si256(bytes, low_halves),
                                            _mm256_and_si256(_mm256_srli_epi16(bytes, 4), high_halves));
      for (int i = 0; i < 4; ++i) {
        const int group = 4 * half + i;
        const __m256i low = _mm256_and_si256(_mm256_srli_epi32(words[v][half], 2 * i), two_bits);
        const __m256i high = _mm256_and_si256(_mm256_srli_epi32(_mm256_slli_epi32(third, 2), i), one_bit);
        const __m256i index = _mm256_or_si256(_mm256_or_si256(low, high), offset);
        const __m256i first = _mm256_shuffle_epi8(load_entries(table + 32 * group), index);
        const __m256i second = _mm256_shuffle_epi8(load_entries(table + 32 * group + 16), index);
        store(panel, group, v, _mm256_blend_epi16(first, second, 0xaa));
      }
    }
  }
}

// A column needs a table of its own. The words of 32 outputs are transposed so that a register holds one byte of each, that
// is two columns; looked up, four such registers are interleaved to four columns of each output again.
inline void decode_4(const uint8_t* table, const __m256i (&words)[kVectors][4], uint8_t* panel) {
  const __m256i gather_bytes =
      _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  const __m256i mask = _mm256_set1_epi8(15);
  for (int word = 0; word < 4; ++word) {
    __m256i t[4];
    for (int v = 0; v < 4; ++v) t[v] = _mm256_shuffle_epi8(words[v][word], gather_bytes);
    const __m256i a = _mm256_unpacklo_epi32(t[0], t[1]), b = _mm256_unpackhi_epi32(t[0], t[1]);
    const __m256i c = _mm256_unpacklo_epi32(t[2], t[3]), d = _mm256_unpackhi_epi32(t[2], t[3]);
    const __m256i bytes[4] = {_mm256_unpacklo_epi64(a, c), _mm256_unpackhi_epi64(a, c), _mm256_unpacklo_epi64(b, d),
                              _mm256_unpackhi_epi64(b, d)};
    for (int second = 0; second < 2; ++second) {
      const int group = 2 * word + second;
      __m256i looked_up[4];
      for (int j = 0; j < 4; ++j) {
        const __m256i index = _mm256_and_si256(second ? _mm256_srli_epi16(bytes[j], 4) : bytes[j], mask);
        looked_up[j] = _mm256_shuffle_epi8(load_entries(table + (4 * group + j) * 16), index);
      }
      const __m256i low01 = _mm256_unpacklo_epi8(looked_up[0], looked_up[1]), high01 = _mm256_unpackhi_epi8(looked_up[0], looked_up[1]);
      const __m256i low23 = _mm256_unpacklo_epi8(looked_up[2], looked_up[3]), high23 = _mm256_unpackhi_epi8(looked_up[2], looked_up[3]);
      store(panel, group, 0, _mm256_unpacklo_epi16(low01, low23));
      store(panel, group, 1, _mm256_unpackhi_epi16(low01, low23));
      store(panel, group, 2, _mm256_unpacklo_epi16(high01, high23));
      store(panel, group, 3, _mm256_unpackhi_epi16(high01, high23));
    }
  }
}

template <int kWidth>
inline void decode_tile(const LayerView& layer, const uint32_t* codes, const uint8_t* table, int64_t left, uint8_t* panel) {
  __m256i words[kVectors][kWidth];
  for (int v = 0; v < kVectors; ++v) {
    for (int i = 0; i < kWidth; ++i) words[v][i] = load_words(codes + i * layer.out_features + 8 * v, left - 8 * v);
  }
  for (int i = 0; i < kWidth; ++i) {
    const uint32_t* later = codes + (i + kBlocksAhead * kWidth) * layer.out_features;
    _mm_prefetch(reinterpret_cast<const char*>(later), _MM_HINT_T1);
    _mm_prefetch(reinterpret_cast<const char*>(later + 16), _MM_HINT_T1);
  }
  if constexpr (kWidth == 4) decode_4(table, words, panel);
  if constexpr (kWidth == 3) decode_3(table, words, panel);
  if constexpr (kWidth == 2) decode_2(table, words, panel);
}

template <int kRows>
inline void multiply_tile(const Activations& activations, int64_t m, const PanelPlace& place, const uint8_t* panel, float* sums,
                          int64_t stride) {
  for (int64_t b = 0; b < place.blocks; ++b) {
    __m256i acc[kRows][kVectors];
    for (int i = 0; i < kRows; ++i) {
      const __m256i first = begin(activations.block_correction[(m + i) * activations.block_stride + place.first_block + b]);
      for (int v = 0; v < kVectors; ++v) acc[i][v] = first;
    }
    const int8_t* x = activations.quantized + m * activations.stride + (place.first_block + b) * kBlock;
#pragma GCC unroll 8
    for (int g = 0; g < kGroupsPerBlock; ++g) {
#pragma GCC unroll 2
      for (int i = 0; i < kRows; ++i) {
        const __m256i four = _mm256_set1_epi32(*reinterpret_cast<const int32_t*>(x + i * activations.stride + 4 * g));
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          const __m256i w =
              _mm256_load_si256(reinterpret_cast<const __m256i*>(panel + ((b * kGroupsPerBlock + g) * kVectors + v) * 32));
          acc[i][v] = dot(acc[i][v], w, four);
        }
      }
    }
    for (int i = 0; i < kRows; ++i) {
      const __m256 factor = _mm256_set1_ps(activations.block_scale[(m + i) * activations.block_stride + place.first_block + b]);
      for (int v = 0; v < kVectors; ++v) {
        float* sum = sums + i * stride + 8 * v;
        _mm256_storeu_ps(sum, _mm256_fmadd_ps(_mm256_cvtepi32_ps(acc[i][v]), factor, _mm256_loadu_ps(sum)));
      }
    }
  }
}

inline void sums_int8(const LayerView& layer, const Activations& activations, int64_t m0, int64_t m1, int64_t n0, int64_t n1,
                      float* sums, int64_t stride, void* scratch) {
  constexpr int64_t kPartBytes = kGroupsPerBlock * kVectors * 32;
  auto* panel = static_cast<uint8_t*>(scratch);
  clear_sums(m1 - m0, n1 - n0, sums, stride);
  for_each_panel(layer, m1 - m0, n0, n1, kPanelParts, [&](const PanelPlace& place) {
    for_each_block(layer, place, [&](const Segment& segment, int64_t block) {
      const uint32_t* codes = block_codes(layer, segment, block);
      const uint8_t* table = block_table(layer, segment, block);
      for (int64_t n = place.n0; n < place.n1; n += kTile) {
        uint8_t* to = panel + ((n - place.n0) / kTile * place.blocks + block - place.first_block) * kPartBytes;
        switch (segment.width) {
          case 4: decode_tile<4>(layer, codes + n, table, place.n1 - n, to); break;
          case 3: decode_tile<3>(layer, codes + n, table, place.n1 - n, to); break;
          default: decode_tile<2>(layer, codes + n, table, place.n1 - n, to); break;
        }
      }
    });
    for (int64_t n = place.n0; n < place.n1; n += kTile) {
      const uint8_t* part = panel + (n - place.n0) / kTile * place.blocks * kPartBytes;
      int64_t m = m0;
      for (; m + 2 <= m1; m += 2) multiply_tile<2>(activations, m, place, part, sums + (m - m0) * stride + n - n0, stride);
      if (m < m1) multiply_tile<1>(activations, m, place, part, sums + (m - m0) * stride + n - n0, stride);
    }
  });
}

// ---- float32

// The centroids of one column, repeated to fill eight entries; `upper` has entries 8 to 15 of a 4-bit column.
template <int kWidth>
inline __m256 column_centroids(const uint8_t* table, int column, int upper) {
  const int in_word = column % (kWidth == 4 ? 8 : 16);
  const int position = kWidth == 4 ? column - in_word + 4 * (in_word % 2) + in_word / 2
                                   : column - in_word + 4 * (in_word % 4) + in_word / 4;
  const uint8_t* entries = table + (position << kWidth) + 8 * upper;
  const __m128i bytes = kWidth == 2 ? _mm_set1_epi32(*reinterpret_cast<const int32_t*>(entries))
                                    : _mm_loadl_epi64(reinterpret_cast<const __m128i*>(entries));
  return _mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_cvtepu8_epi32(bytes), _mm256_set1_epi32(128)));
}

// A panel's column is kTile floats.
template <int kWidth>
inline void decode_float_tile(const LayerView& layer, const uint32_t* codes, const uint8_t* table, int64_t left, float* panel) {
  for (int v = 0; v < kVectors; ++v) {
    __m256i words[kWidth];
    for (int i = 0; i < kWidth; ++i) words[i] = load_words(codes + i * layer.out_features + 8 * v, left - 8 * v);
    for (int column = 0; column < kBlock; ++column) {
      __m256 centroids;
      if constexpr (kWidth == 4) {
        const __m256i index = _mm256_srli_epi32(words[column / 8], 4 * (column % 8));
        const __m256 lower = _mm256_permutevar8x32_ps(column_centroids<4>(table, column, 0), index);
        const __m256 upper = _mm256_permutevar8x32_ps(column_centroids<4>(table, column, 1), index);
        centroids = _mm256_blendv_ps(lower, upper, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
      } else {
        __m256i index = _mm256_srli_epi32(words[column / 16], 2 * (column % 16));
        if constexpr (kWidth == 3) {
          const __m256i third = _mm256_slli_epi32(_mm256_and_si256(_mm256_srli_epi32(words[2], column), _mm256_set1_epi32(1)), 2);
          index = _mm256_or_si256(_mm256_and_si256(index, _mm256_set1_epi32(3)), third);
        }
        centroids = _mm256_permutevar8x32_ps(column_centroids<kWidth>(table, column, 0), index);
      }
      _mm256_store_ps(panel + column * kTile + 8 * v, centroids);
    }
  }
}

template <int kRows>
inline void multiply_float_tile(const float* x, int64_t x_stride, const float* panel, int64_t columns, float* sums, int64_t stride) {
  __m256 acc[kRows][kVectors];
  for (int i = 0; i < kRows; ++i) {
    for (int v = 0; v < kVectors; ++v) acc[i][v] = _mm256_loadu_ps(sums + i * stride + 8 * v);
  }
  for (int64_t k = 0; k < columns; ++k) {
#pragma GCC unroll 3
    for (int i = 0; i < kRows; ++i) {
      const __m256 value = _mm256_set1_ps(x[i * x_stride + k]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        acc[i][v] = _mm256_fmadd_ps(value, _mm256_load_ps(panel + k * kTile + 8 * v), acc[i][v]);
      }
    }
  }
  for (int i = 0; i < kRows; ++i) {
    for (int v = 0; v < kVectors; ++v) _mm256_storeu_ps(sums + i * stride + 8 * v, acc[i][v]);
  }
}

inline void sums_float(const LayerView& layer, const Activations& activations, int64_t m0, int64_t m1, int64_t n0, int64_t n1,
                       float* sums, int64_t stride, void* scratch) {
  constexpr int64_t kPartElements = kBlock * kTile;
  auto* panel = static_cast<float*>(scratch);
  clear_sums(m1 - m0, n1 - n0, sums, stride);
  for_each_panel(layer, m1 - m0, n0, n1, kFloatPanelParts, [&](const PanelPlace& place) {
    for_each_block(layer, place, [&](const Segment& segment, int64_t block) {
      const uint32_t* codes = block_codes(layer, segment, block);
      const uint8_t* table = block_table(layer, segment, block);
      for (int64_t n = place.n0; n < place.n1; n += kTile) {
        float* to = panel + ((n - place.n0) / kTile * place.blocks + block - place.first_block) * kPartElements;
        switch (segment.width) {
          case 4: decode_float_tile<4>(layer, codes + n, table, place.n1 - n, to); break;
          case 3: decode_float_tile<3>(layer, codes + n, table, place.n1 - n, to); break;
          default: decode_float_tile<2>(layer, codes + n, table, place.n1 - n, to); break;
        }
      }
    });
    for (int64_t n = place.n0; n < place.n1; n += kTile) {
      const float* part = panel + (n - place.n0) / kTile * place.blocks * kPartElements;
      const int64_t columns = place.blocks * kBlock;
      int64_t m = m0;
      const auto tile = [&](auto multiply, int rows) {
        multiply(activations.scaled + m * activations.stride + place.first_block * kBlock, activations.stride, part, columns,
                 sums + (m - m0) * stride + n - n0, stride);
        m += rows;
      };
      while (m + 3 <= m1) tile(multiply_float_tile<3>, 3);
      while (m < m1) tile(multiply_float_tile<1>, 1);
    }
  });
}

// ---- outliers, epilogue, conversions

inline void add_outliers_of_row(const LayerView& layer, const float* scaled, int64_t n0, int64_t n1, float* sums) {
  const auto* narrow = static_cast<const uint16_t*>(layer.outlier_index);
  const auto* wide = static_cast<const int32_t*>(layer.outlier_index);
  for (int64_t n = n0; n < n1; ++n) {
    const int32_t begin = layer.outlier_ptr[n], end = layer.outlier_ptr[n + 1];
    if (begin == end) continue;
    __m256 lanes = _mm256_setzero_ps();
    int32_t i = begin;
    for (; i + kOutlierLanes <= end; i += kOutlierLanes) {
      const __m256i columns = layer.wide_outlier_index
                                  ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(wide + i))
                                  : _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(narrow + i)));
      const __m256 values = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(layer.outlier_value + i)));
      lanes = _mm256_fmadd_ps(values, _mm256_i32gather_ps(scaled, columns, 4), lanes);
    }
    alignas(32) float sum[kOutlierLanes];
    _mm256_store_ps(sum, lanes);
    for (int j = 0; i < end; ++i, ++j) {
      const int64_t column = layer.wide_outlier_index ? wide[i] : narrow[i];
      const __m128 value = _mm_cvtph_ps(_mm_cvtsi32_si128(layer.outlier_value[i]));
      sum[j] = _mm_cvtss_f32(_mm_fmadd_ss(value, _mm_set_ss(scaled[column]), _mm_set_ss(sum[j])));
    }
    for (int width = kOutlierLanes / 2; width > 0; width /= 2) {
      for (int j = 0; j < width; ++j) sum[j] += sum[j + width];
    }
    sums[n - n0] += sum[0];
  }
}

inline void add_outliers(const LayerView& layer, const Activations& activations, int64_t m0, int64_t m1, int64_t n0, int64_t n1,
                         float* sums, int64_t stride) {
  for (int64_t m = m0; m < m1; ++m) {
    add_outliers_of_row(layer, activations.scaled + m * activations.stride, n0, n1, sums + (m - m0) * stride);
  }
}

inline void finish_row(const LayerView& layer, int64_t n0, int64_t n1, const float* sums, float* y) {
  for (int64_t n = n0; n < n1; n += 8) {
    const __m256i mask = lane_mask(n1 - n);
    const __m256 scale = _mm256_maskload_ps(layer.row_scale + n, mask);
    const __m256 sum = _mm256_loadu_ps(sums + n - n0);
    const __m256 result = layer.bias ? _mm256_fmadd_ps(scale, sum, _mm256_maskload_ps(layer.bias + n, mask)) : _mm256_mul_ps(scale, sum);
    _mm256_maskstore_ps(y + n - n0, mask, result);
  }
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
