// From code words to centroids, for the AVX2 families: 32 outputs and the 32 columns of a block at a time.
//
// A register is a lane of 32 bits for each of eight outputs. What comes out has, in the four bytes of a lane, the centroids
// of the four columns of a group; `put(group, vector, bytes)` takes it for outputs [8 * vector, 8 * vector + 8).
#pragma once

#include "avx2_common.h"

namespace claq {
namespace {

constexpr int kDecodedVectors = 4;
constexpr int kDecodedOutputs = 8 * kDecodedVectors;

// The look-up tables of a block: for each group four tables of 16 entries (4 bits: one for each column), two (3 bits: entries 0
// to 3 of the four columns, then 4 to 7) or one (2 bits).
struct alignas(32) BlockTables {
  uint8_t entries[kBlock * 16];
};

// Calls change(sixteen entries of the layer's table, position of the first, entries of a position) and keeps what it returns.
template <int kWidth, class Change>
CLAQ_INLINE void make_tables(const uint8_t* table, const Change& change, BlockTables& tables) {
  constexpr int kPositions = 16 >> kWidth;  // in 16 bytes
  auto* to = reinterpret_cast<__m128i*>(tables.entries);
  const auto load = [&](int i) { return change(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table) + i), i * kPositions); };
  if constexpr (kWidth == 3) {
    for (int group = 0; group < kGroupsPerBlock; ++group) {
      const __m128 first = _mm_castsi128_ps(load(2 * group)), second = _mm_castsi128_ps(load(2 * group + 1));
      _mm_store_si128(to + 2 * group, _mm_castps_si128(_mm_shuffle_ps(first, second, 0x88)));
      _mm_store_si128(to + 2 * group + 1, _mm_castps_si128(_mm_shuffle_ps(first, second, 0xdd)));
    }
  } else {
    for (int i = 0; i < (kBlock << kWidth) / 16; ++i) _mm_store_si128(to + i, load(i));
  }
}

CLAQ_INLINE __m256i table_entries(const BlockTables& tables, int i) {
  return _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(tables.entries) + i));
}

// Words of one row of `codes` for 32 outputs, of which `left` exist.
template <bool kTail>
CLAQ_INLINE __m256i load_words(const uint32_t* words, int64_t left, int vector) {
  words += 8 * vector;
  if constexpr (!kTail) return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words));
  return _mm256_maskload_epi32(reinterpret_cast<const int*>(words), lane_mask(left - 8 * vector));
}

// Four columns share a table.
template <bool kTail, class Put>
CLAQ_INLINE void decode_2(const BlockTables& tables, const uint32_t* codes, int64_t row_stride, int64_t left, const Put& put) {
  const __m256i mask = _mm256_set1_epi8(3), offset = _mm256_set1_epi32(0x0c080400);
  for (int half = 0; half < 2; ++half) {
    __m256i words[kDecodedVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kDecodedVectors; ++v) words[v] = load_words<kTail>(codes + half * row_stride, left, v);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const int group = 4 * half + i;
      const __m256i entries = table_entries(tables, group);
#pragma GCC unroll 4
      for (int v = 0; v < kDecodedVectors; ++v) {
        const __m256i low = _mm256_and_si256(_mm256_srli_epi32(words[v], 2 * i), mask);
        put(group, v, _mm256_shuffle_epi8(entries, _mm256_or_si256(low, offset)));
      }
    }
  }
}

// The same with two tables, of which the third bit chooses.
template <bool kTail, class Put>
CLAQ_INLINE void decode_3(const BlockTables& tables, const uint32_t* codes, int64_t row_stride, int64_t left, const Put& put) {
  const __m256i mask = _mm256_set1_epi8(3), offset = _mm256_set1_epi32(0x0c080400);
  const __m256i odd_bytes = _mm256_set1_epi16(static_cast<int16_t>(0xff00));
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    // The third bits of the four groups' columns, in the high half of each column's byte.
    const __m256i spread = _mm256_broadcastsi128_si256(
        half ? _mm_setr_epi8(2, 2, 3, 3, 6, 6, 7, 7, 10, 10, 11, 11, 14, 14, 15, 15)
             : _mm_setr_epi8(0, 0, 1, 1, 4, 4, 5, 5, 8, 8, 9, 9, 12, 12, 13, 13));
    __m256i words[kDecodedVectors], third[kDecodedVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kDecodedVectors; ++v) {
      words[v] = load_words<kTail>(codes + half * row_stride, left, v);
      const __m256i bytes = _mm256_shuffle_epi8(load_words<kTail>(codes + 2 * row_stride, left, v), spread);
      third[v] = _mm256_blendv_epi8(_mm256_slli_epi16(bytes, 4), bytes, odd_bytes);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const int group = 4 * half + i;
      const __m256i lower = table_entries(tables, 2 * group), upper = table_entries(tables, 2 * group + 1);
#pragma GCC unroll 4
      for (int v = 0; v < kDecodedVectors; ++v) {
        const __m256i index = _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi32(words[v], 2 * i), mask), offset);
        put(group, v, _mm256_blendv_epi8(_mm256_shuffle_epi8(lower, index), _mm256_shuffle_epi8(upper, index),
                                         _mm256_slli_epi16(third[v], 3 - i)));
      }
    }
  }
}

// A column needs a table of its own. The words of 32 outputs are transposed so that a register holds one byte of each, that
// is two columns; looked up, four such registers are interleaved to four columns of each output again.
template <bool kTail, class Put>
CLAQ_INLINE void decode_4(const BlockTables& tables, const uint32_t* codes, int64_t row_stride, int64_t left, const Put& put) {
  const __m256i gather_bytes =
      _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  const __m256i mask = _mm256_set1_epi8(15);
  for (int word = 0; word < 4; ++word) {
    __m256i t[kDecodedVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kDecodedVectors; ++v) {
      t[v] = _mm256_shuffle_epi8(load_words<kTail>(codes + word * row_stride, left, v), gather_bytes);
    }
    const __m256i a = _mm256_unpacklo_epi32(t[0], t[1]), b = _mm256_unpackhi_epi32(t[0], t[1]);
    const __m256i c = _mm256_unpacklo_epi32(t[2], t[3]), d = _mm256_unpackhi_epi32(t[2], t[3]);
    const __m256i bytes[4] = {_mm256_unpacklo_epi64(a, c), _mm256_unpackhi_epi64(a, c), _mm256_unpacklo_epi64(b, d),
                              _mm256_unpackhi_epi64(b, d)};
#pragma GCC unroll 2
    for (int second = 0; second < 2; ++second) {
      const int group = 2 * word + second;
      __m256i found[4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const __m256i index = _mm256_and_si256(second ? _mm256_srli_epi16(bytes[j], 4) : bytes[j], mask);
        found[j] = _mm256_shuffle_epi8(table_entries(tables, 4 * group + j), index);
      }
      const __m256i low01 = _mm256_unpacklo_epi8(found[0], found[1]), high01 = _mm256_unpackhi_epi8(found[0], found[1]);
      const __m256i low23 = _mm256_unpacklo_epi8(found[2], found[3]), high23 = _mm256_unpackhi_epi8(found[2], found[3]);
      put(group, 0, _mm256_unpacklo_epi16(low01, low23));
      put(group, 1, _mm256_unpackhi_epi16(low01, low23));
      put(group, 2, _mm256_unpacklo_epi16(high01, high23));
      put(group, 3, _mm256_unpackhi_epi16(high01, high23));
    }
  }
}

template <int kWidth, bool kTail, class Put>
CLAQ_INLINE void decode(const BlockTables& tables, const uint32_t* codes, int64_t row_stride, int64_t left, const Put& put) {
  if constexpr (kWidth == 4) decode_4<kTail>(tables, codes, row_stride, left, put);
  if constexpr (kWidth == 3) decode_3<kTail>(tables, codes, row_stride, left, put);
  if constexpr (kWidth == 2) decode_2<kTail>(tables, codes, row_stride, left, put);
}

inline const uint32_t* block_codes(const LayerView& layer, const Segment& segment, int64_t block) {
  return layer.codes + (segment.first_row + (block - segment.first_block) * segment.width) * layer.out_features;
}

inline const uint8_t* block_table(const LayerView& layer, const Segment& segment, int64_t block) {
  return layer.table + segment.table_offset + (((block - segment.first_block) * kBlock) << segment.width);
}

template <class Body>
CLAQ_INLINE void with_width(int width, const Body& body) {
  if (width == 4) body(Constant<4>{});
  else if (width == 3) body(Constant<3>{});
  else body(Constant<2>{});
}

// Calls body(segment, block) for each block of [first, first + count).
template <class Body>
CLAQ_INLINE void for_each_block(const LayerView& layer, int64_t first, int64_t count, const Body& body) {
  for (int s = 0; s < layer.segment_count; ++s) {
    const Segment& segment = layer.segments[s];
    const int64_t end = segment.first_block + segment.blocks;
    const int64_t from = first > segment.first_block ? first : segment.first_block;
    const int64_t to = first + count < end ? first + count : end;
    for (int64_t block = from; block < to; ++block) body(segment, block);
  }
}

}  // namespace
}  // namespace claq
