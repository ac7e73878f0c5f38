// float32 sums for the AVX-512 families.
//
// For a few rows of x, taken one by one, the products are folded into the lookup: a table of activation * centroid for each column of 4 or 3
// bits, and for each pair of columns of 2 bits all sixteen sums of two products, so that a nibble of code bits costs one
// permutation and one addition. For more rows centroids are looked up once and multiplied by each row.
#pragma once

#include "avx512_common.h"

namespace claq {
namespace {

// The 16-lane index of column `column` of a block; lanes' bits above the width are undefined unless stated.
template <int kWidth, int kColumn>
inline __m512i column_index(const __m512i (&words)[kWidth]) {
  if constexpr (kWidth == 4) {
    return _mm512_srli_epi32(words[kColumn / 8], 4 * (kColumn % 8));
  } else if constexpr (kWidth == 2) {
    return _mm512_srli_epi32(words[kColumn / 16], 2 * (kColumn % 16));
  } else {
    const __m512i low = _mm512_srli_epi32(words[kColumn / 16], 2 * (kColumn % 16));
    const __m512i third = _mm512_ror_epi32(words[2], (kColumn + 30) % 32);
    return _mm512_ternarylogic_epi32(low, third, _mm512_set1_epi32(3), 0xe4);  // low two bits of the first, rest of the second
  }
}

template <int... kIndex>
struct Indices {};
template <int kCount, int... kRest>
struct MakeIndices : MakeIndices<kCount - 1, kCount - 1, kRest...> {};
template <int... kRest>
struct MakeIndices<0, kRest...> {
  using Type = Indices<kRest...>;
};

// The 16 entries that _mm512_permutexvar_ps reads for one column: its centroids, repeated to fill the vector because the
// index bits above the width are not masked.
template <int kWidth>
inline __m512 column_centroids(const uint8_t* table, int column) {
  const int in_word = column % (kWidth == 4 ? 8 : 16);
  const int position = kWidth == 4 ? column - in_word + 4 * (in_word % 2) + in_word / 2
                                   : column - in_word + 4 * (in_word % 4) + in_word / 4;
  const uint8_t* entries = table + (position << kWidth);
  __m128i bytes;
  if constexpr (kWidth == 4) {
    bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(entries));
  } else if constexpr (kWidth == 3) {
    bytes = _mm_set1_epi64x(*reinterpret_cast<const int64_t*>(entries));
  } else {
    bytes = _mm_set1_epi32(*reinterpret_cast<const int32_t*>(entries));
  }
  return _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_cvtepu8_epi32(bytes), _mm512_set1_epi32(128)));
}

// ---- one row of x

// Up to this many rows are faster one by one than through a panel.
constexpr int64_t kSingleRows = 6;

template <int kWidth>
constexpr int kLookups = kWidth == 2 ? 16 : 32;

template <int kWidth>
inline void build_products(const uint8_t* table, const float* scaled, __m512* products) {
  if constexpr (kWidth == 2) {
    const __m512i second = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    for (int i = 0; i < 16; ++i) {
      const __m512 a = _mm512_mul_ps(_mm512_set1_ps(scaled[2 * i]), column_centroids<2>(table, 2 * i));
      const __m512 b = _mm512_mul_ps(_mm512_set1_ps(scaled[2 * i + 1]), column_centroids<2>(table, 2 * i + 1));
      products[i] = _mm512_add_ps(a, _mm512_permutexvar_ps(second, b));
    }
  } else {
    for (int i = 0; i < 32; ++i) {
      products[i] = _mm512_mul_ps(_mm512_set1_ps(scaled[i]), column_centroids<kWidth>(table, i));
    }
  }
}

template <int kWidth, bool kTail, int... kLookup>
inline void row_step(const uint32_t* codes, int64_t row_stride, __mmask16 mask, const __m512* products, float* sums,
                     Indices<kLookup...>) {
  __m512i words[kWidth];
  for (int i = 0; i < kWidth; ++i) {
    words[i] = load_words<kTail>(codes + i * row_stride, mask);
    _mm_prefetch(reinterpret_cast<const char*>(codes + (i + 2 * kWidth) * row_stride), _MM_HINT_T1);
  }
  __m512 partial[4] = {_mm512_loadu_ps(sums), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
  // At 2 bits a lookup takes a nibble, that is two columns.
  ((partial[kLookup % 4] = _mm512_add_ps(
        partial[kLookup % 4],
        _mm512_permutexvar_ps(column_index<kWidth, kWidth == 2 ? 2 * kLookup : kLookup>(words), products[kLookup]))),
   ...);
  _mm512_storeu_ps(sums, _mm512_add_ps(_mm512_add_ps(partial[0], partial[1]), _mm512_add_ps(partial[2], partial[3])));
}

template <int kWidth>
inline void row_segment(const LayerView& layer, const Segment& segment, const float* scaled, int64_t n0, int64_t n1,
                        float* sums) {
  using Lookups = typename MakeIndices<kLookups<kWidth>>::Type;
  const int64_t full = n0 + (n1 - n0) / 16 * 16;
  alignas(64) __m512 products[kLookups<kWidth>];
  for (int64_t b = 0; b < segment.blocks; ++b) {
    build_products<kWidth>(layer.table + segment.table_offset + ((b * kBlock) << kWidth),
                           scaled + (segment.first_block + b) * kBlock, products);
    const uint32_t* codes = layer.codes + (segment.first_row + b * kWidth) * layer.out_features;
    for (int64_t n = n0; n < full; n += 16) {
      row_step<kWidth, false>(codes + n, layer.out_features, 0xffff, products, sums + n - n0, Lookups{});
    }
    if (full < n1) {
      row_step<kWidth, true>(codes + full, layer.out_features, first_lanes(n1 - full), products, sums + full - n0, Lookups{});
    }
  }
}

// ---- several rows of x: a panel of kVectors * 16 outputs is decoded and multiplied by tiles of rows

// Blocks of a panel: of many rows x is larger than a cache, so that many outputs are taken before its next columns; sums are loaded
// and stored once a panel.
constexpr int64_t kFewFloatRows = 32;
constexpr int64_t kFewFloatBlocks = 4;
constexpr int64_t kManyFloatBlocks = 12;
constexpr int64_t kWideFloatSums = 128 * 1024;

template <int kWidth, int kVectors, int... kColumn>
inline void decode_float_block(const uint8_t* table, const uint32_t* codes, int64_t row_stride, const __mmask16 (&masks)[kVectors],
                               float* panel, Indices<kColumn...>) {
  for (int v = 0; v < kVectors; ++v) {
    __m512i words[kWidth];
    for (int i = 0; i < kWidth; ++i) {
      words[i] = load_words<true>(codes + i * row_stride + 16 * v, masks[v]);
      _mm_prefetch(reinterpret_cast<const char*>(codes + i * row_stride + 16 * (v + kVectors)), _MM_HINT_T1);
    }
    (_mm512_store_ps(panel + (kColumn * kVectors + v) * 16,
                     _mm512_permutexvar_ps(column_index<kWidth, kColumn>(words), column_centroids<kWidth>(table, kColumn))),
     ...);
  }
}

template <int kVectors>
inline void decode_float_panel(const LayerView& layer, int64_t first_block, int64_t blocks, int64_t n, int64_t n1, float* panel) {
  __mmask16 masks[kVectors];
  for (int v = 0; v < kVectors; ++v) masks[v] = first_lanes(n1 - n - 16 * v);
  using Columns = typename MakeIndices<kBlock>::Type;
  for (int s = 0; s < layer.segment_count; ++s) {
    const Segment& segment = layer.segments[s];
    for (int64_t block = first_block; block < first_block + blocks; ++block) {
      const int64_t b = block - segment.first_block;
      if (b < 0 || b >= segment.blocks) continue;
      const uint8_t* table = layer.table + segment.table_offset + ((b * kBlock) << segment.width);
      const uint32_t* codes = layer.codes + (segment.first_row + b * segment.width) * layer.out_features + n;
      float* to = panel + (block - first_block) * kBlock * kVectors * 16;
      switch (segment.width) {
        case 4: decode_float_block<4, kVectors>(table, codes, layer.out_features, masks, to, Columns{}); break;
        case 3: decode_float_block<3, kVectors>(table, codes, layer.out_features, masks, to, Columns{}); break;
        default: decode_float_block<2, kVectors>(table, codes, layer.out_features, masks, to, Columns{}); break;
      }
    }
  }
}

template <int kRows, int kVectors>
inline void multiply_float_tile(const float* x, int64_t x_stride, const float* panel, int64_t columns, float* sums, int64_t stride) {
  __m512 acc[kRows][kVectors];
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) acc[m][v] = _mm512_loadu_ps(sums + m * stride + 16 * v);
  }
  for (int64_t k = 0; k < columns; ++k) {
    __m512 w[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) w[v] = _mm512_load_ps(panel + (k * kVectors + v) * 16);
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
      const __m512 value = _mm512_set1_ps(x[m * x_stride + k]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) acc[m][v] = _mm512_fmadd_ps(value, w[v], acc[m][v]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) _mm512_storeu_ps(sums + m * stride + 16 * v, acc[m][v]);
  }
}

template <int kVectors>
inline void float_panel(const LayerView& layer, const Activations& activations, int64_t m0, int64_t m1, int64_t block, int64_t blocks,
                        int64_t n, int64_t n1, float* sums, int64_t stride, float* panel) {
  decode_float_panel<kVectors>(layer, block, blocks, n, n1, panel);
  int64_t m = m0;
  const auto tile = [&](auto rows) {
    constexpr int kRows = decltype(rows)::kValue;
    multiply_float_tile<kRows, kVectors>(activations.scaled + m * activations.stride + block * kBlock, activations.stride, panel,
                                         blocks * kBlock, sums + (m - m0) * stride, stride);
    m += kRows;
  };
  while (m1 - m >= 8) tile(Constant<8>{});
  for_tail<7>(m1 - m, tile);
}

inline void sums_float(const LayerView& layer, const Activations& activations, int64_t m0, int64_t m1, int64_t n0, int64_t n1,
                       float* sums, int64_t stride, void* scratch) {
  clear_sums(m1 - m0, n1 - n0, sums, stride);
  if (m1 - m0 <= kSingleRows) {
    for (int64_t m = m0; m < m1; ++m) {
      const float* scaled = activations.scaled + m * activations.stride;
      float* row = sums + (m - m0) * stride;
      for_segments(layer, [&](const Segment& segment, auto width) CLAQ_STEP {
        row_segment<decltype(width)::kValue>(layer, segment, scaled, n0, n1, row);
      });
    }
    return;
  }
  float* panel = static_cast<float*>(scratch);
  const int64_t depth = m1 - m0 <= kFewFloatRows ? kFewFloatBlocks : kManyFloatBlocks;
  for (int64_t block = 0; block < layer.blocks; block += depth) {
    const int64_t blocks = layer.blocks - block < depth ? layer.blocks - block : depth;
    for (int64_t n = n0; n < n1; n += 48) {
      const int64_t left = n1 - n;
      float* tile = sums + n - n0;
      if (left > 32) float_panel<3>(layer, activations, m0, m1, block, blocks, n, n1, tile, stride, panel);
      else if (left > 16) float_panel<2>(layer, activations, m0, m1, block, blocks, n, n1, tile, stride, panel);
      else float_panel<1>(layer, activations, m0, m1, block, blocks, n, n1, tile, stride, panel);
    }
  }
}

}  // namespace
}  // namespace claq
