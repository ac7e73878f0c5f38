// int8 sums for the AVX-512 families; `Isa` says how codes become weights and how weights meet activations:
//
//   load_table<kWidth>(table, group), step<kWidth>(words, i), decode<kWidth, second>(words, step, i, entries): centroids of 16
//     outputs and the four columns of group group_of(i, second), as bytes; `step` is what both groups of a step share;
//   weights(decoded), activation(four), begin(correction), dot(sum, weights, activation): the arithmetic.
#pragma once

#include "avx512_common.h"

namespace claq {
namespace {

inline __m512i broadcast_four(const int8_t* values) { return _mm512_set1_epi32(*reinterpret_cast<const int32_t*>(values)); }

// ---- up to eight rows of x: codes are read once, in order, and never leave the registers

// How many blocks ahead code words are fetched: the rows of a tile are too short for the hardware to run far enough ahead.
constexpr int kBlocksAhead = 4;

// The groups that come out of `words` at step i of 0..3.
template <int kWidth>
constexpr int group_of(int i, int second) {
  return kWidth == 4 ? 2 * i + second : i + 4 * second;
}

// One block, 16 * kVectors outputs.
template <class Isa, int kWidth, int kRows, int kVectors, bool kTail>
inline void stream_step(const uint32_t* codes, int64_t row_stride, __mmask16 mask, const uint8_t* table,
                        const int8_t* const (&x)[kRows], const float (&scale)[kRows], const int32_t (&correction)[kRows],
                        float* sums, int64_t stride) {
  __m512i words[kVectors][kWidth];
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
#pragma GCC unroll 4
    for (int i = 0; i < kWidth; ++i) {
      words[v][i] = load_words<kTail>(codes + i * row_stride + 16 * v, mask);
      const uint32_t* later = codes + (i + kBlocksAhead * kWidth) * row_stride + 16 * v;
      _mm_prefetch(reinterpret_cast<const char*>(later), _MM_HINT_T1);
    }
  }
  __m512i dot[kRows][kVectors];
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) dot[m][v] = Isa::begin(correction[m]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    typename Isa::template Step<kWidth> steps[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) steps[v] = Isa::template step<kWidth>(words[v], i);
#pragma GCC unroll 2
    for (int second = 0; second < 2; ++second) {
      const int group = group_of<kWidth>(i, second);
      const auto entries = Isa::template load_table<kWidth>(table, group);
      typename Isa::Weights w[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        w[v] = Isa::weights(second ? Isa::template decode<kWidth, 1>(words[v], steps[v], i, entries)
                                   : Isa::template decode<kWidth, 0>(words[v], steps[v], i, entries));
      }
#pragma GCC unroll 8
      for (int m = 0; m < kRows; ++m) {
        const auto four = Isa::activation(x[m] + 4 * group);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) dot[m][v] = Isa::dot(dot[m][v], w[v], four);
      }
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m) {
    const __m512 factor = _mm512_set1_ps(scale[m]);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      float* sum = sums + m * stride + 16 * v;
      _mm512_storeu_ps(sum, _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot[m][v]), factor, _mm512_loadu_ps(sum)));
    }
  }
}

template <class Isa, int kWidth, int kRows>
inline void stream_segment(const LayerView& layer, const Segment& segment, const Activations& activations, int64_t m0, int64_t n0,
                           int64_t n1, float* sums, int64_t stride) {
  constexpr int kVectors = kRows == 1 ? 1 : kRows <= 4 ? 4 : 2;
  for (int64_t b = 0; b < segment.blocks; ++b) {
    const int64_t block = segment.first_block + b;
    const uint8_t* table = layer.table + segment.table_offset + ((b * kBlock) << kWidth);
    const int8_t* x[kRows];
    float scale[kRows];
    int32_t correction[kRows];
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
      x[m] = activations.quantized + (m0 + m) * activations.stride + block * kBlock;
      scale[m] = activations.block_scale[(m0 + m) * activations.block_stride + block];
      correction[m] = activations.block_correction[(m0 + m) * activations.block_stride + block];
    }
    const uint32_t* codes = layer.codes + (segment.first_row + b * kWidth) * layer.out_features;
    int64_t n = n0;
    for (; n + 16 * kVectors <= n1; n += 16 * kVectors) {
      stream_step<Isa, kWidth, kRows, kVectors, false>(codes + n, layer.out_features, 0xffff, table, x, scale, correction,
                                                       sums + n - n0, stride);
    }
    for (; n < n1; n += 16) {
      stream_step<Isa, kWidth, kRows, 1, true>(codes + n, layer.out_features, first_lanes(n1 - n), table, x, scale, correction,
                                               sums + n - n0, stride);
    }
  }
}

template <class Isa, int kRows>
void stream(const LayerView& layer, const Activations& activations, int64_t m0, int64_t n0, int64_t n1, float* sums, int64_t stride) {
  for (int s = 0; s < layer.segment_count; ++s) {
    const Segment& segment = layer.segments[s];
    switch (segment.width) {
      case 4: stream_segment<Isa, 4, kRows>(layer, segment, activations, m0, n0, n1, sums, stride); break;
      case 3: stream_segment<Isa, 3, kRows>(layer, segment, activations, m0, n0, n1, sums, stride); break;
      default: stream_segment<Isa, 2, kRows>(layer, segment, activations, m0, n0, n1, sums, stride); break;
    }
  }
}

// ---- more rows: a panel of kVectors * 16 outputs is decoded and multiplied by tiles of rows

constexpr int kPanelBlocks = 16;

template <class Isa, int kWidth, int kVectors>
inline void decode_panel_block(const uint8_t* table, const uint32_t* codes, int64_t row_stride,
                               const __mmask16 (&masks)[kVectors], uint8_t* panel) {
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    __m512i words[kWidth];
#pragma GCC unroll 4
    for (int i = 0; i < kWidth; ++i) words[i] = load_words<true>(codes + i * row_stride + 16 * v, masks[v]);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const auto step = Isa::template step<kWidth>(words, i);
      const int first = group_of<kWidth>(i, 0), second = group_of<kWidth>(i, 1);
      _mm512_store_si512(panel + (first * kVectors + v) * 64,
                         Isa::template decode<kWidth, 0>(words, step, i, Isa::template load_table<kWidth>(table, first)));
      _mm512_store_si512(panel + (second * kVectors + v) * 64,
                         Isa::template decode<kWidth, 1>(words, step, i, Isa::template load_table<kWidth>(table, second)));
    }
  }
}

template <class Isa, int kVectors>
void decode_panel(const LayerView& layer, int64_t first_block, int64_t blocks, int64_t n, int64_t n1, uint8_t* panel) {
  __mmask16 masks[kVectors];
  for (int v = 0; v < kVectors; ++v) masks[v] = n1 - n > 16 * v ? first_lanes(n1 - n - 16 * v) : 0;
  for (int s = 0; s < layer.segment_count; ++s) {
    const Segment& segment = layer.segments[s];
    for (int64_t block = first_block; block < first_block + blocks; ++block) {
      const int64_t b = block - segment.first_block;
      if (b < 0 || b >= segment.blocks) continue;
      const uint8_t* entries = layer.table + segment.table_offset + ((b * kBlock) << segment.width);
      const uint32_t* codes = layer.codes + (segment.first_row + b * segment.width) * layer.out_features + n;
      uint8_t* to = panel + (block - first_block) * kGroupsPerBlock * kVectors * 64;
      switch (segment.width) {
        case 4: decode_panel_block<Isa, 4, kVectors>(entries, codes, layer.out_features, masks, to); break;
        case 3: decode_panel_block<Isa, 3, kVectors>(entries, codes, layer.out_features, masks, to); break;
        default: decode_panel_block<Isa, 2, kVectors>(entries, codes, layer.out_features, masks, to); break;
      }
    }
  }
}

// Rows of code words to fetch while something else is computed: a panel is too narrow a stripe of them for the hardware to
// see the pattern.
struct CodeRows {
  const uint32_t* first;
  int64_t rows;
  int64_t stride;

  // Part `part` of `parts`.
  template <int kVectors>
  void prefetch(int64_t part, int64_t parts) const {
    for (int64_t r = rows * part / parts; r < rows * (part + 1) / parts; ++r) {
      for (int v = 0; v < kVectors; ++v) {
        _mm_prefetch(reinterpret_cast<const char*>(first + r * stride + 16 * v), _MM_HINT_T1);
      }
    }
  }
};

inline int64_t first_code_row(const LayerView& layer, int64_t block) {
  for (int s = 0; s < layer.segment_count; ++s) {
    const Segment& segment = layer.segments[s];
    if (block < segment.first_block + segment.blocks) return segment.first_row + (block - segment.first_block) * segment.width;
  }
  const Segment& last = layer.segments[layer.segment_count - 1];
  return last.first_row + last.blocks * last.width;
}

template <class Isa, int kRows, int kVectors>
inline void multiply_tile(const Activations& activations, int64_t m, int64_t first_block, int64_t blocks, const uint8_t* panel,
                          float* sums, int64_t stride, const CodeRows& next) {
  const int8_t* x = activations.quantized + m * activations.stride + first_block * kBlock;
  const float* scale = activations.block_scale + m * activations.block_stride + first_block;
  const int32_t* correction = activations.block_correction + m * activations.block_stride + first_block;
  for (int64_t b = 0; b < blocks; ++b) {
    __m512i acc[kRows][kVectors];
    next.prefetch<kVectors>(b, blocks);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) acc[i][v] = Isa::begin(correction[i * activations.block_stride + b]);
    }
#pragma GCC unroll 8
    for (int g = 0; g < kGroupsPerBlock; ++g) {
      typename Isa::Weights w[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        w[v] = Isa::weights(_mm512_load_si512(panel + ((b * kGroupsPerBlock + g) * kVectors + v) * 64));
      }
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
        const auto four = Isa::activation(x + i * activations.stride + b * kBlock + 4 * g);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) acc[i][v] = Isa::dot(acc[i][v], w[v], four);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const __m512 factor = _mm512_set1_ps(scale[i * activations.block_stride + b]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        float* sum = sums + i * stride + 16 * v;
        _mm512_storeu_ps(sum, _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc[i][v]), factor, _mm512_loadu_ps(sum)));
      }
    }
  }
}

template <class Isa, int kVectors>
void panel_sums(const LayerView& layer, const Activations& activations, int64_t m0, int64_t m1, int64_t n, int64_t n1, float* sums,
                int64_t stride, uint8_t* panel) {
  for (int64_t block = 0; block < layer.blocks; block += kPanelBlocks) {
    const int64_t blocks = layer.blocks - block < kPanelBlocks ? layer.blocks - block : kPanelBlocks;
    decode_panel<Isa, kVectors>(layer, block, blocks, n, n1, panel);
    const int64_t row = first_code_row(layer, block);
    // The same rows of the panel to the right, fetched once: while the first tile is multiplied.
    CodeRows next{layer.codes + row * layer.out_features + n + 16 * kVectors, first_code_row(layer, block + blocks) - row,
                  layer.out_features};
    int64_t m = m0;
    const auto tile = [&](auto rows) {
      constexpr int kRows = decltype(rows)::kValue;
      multiply_tile<Isa, kRows, kVectors>(activations, m, block, blocks, panel, sums + (m - m0) * stride, stride, next);
      next.rows = 0;
      m += kRows;
    };
    while (m1 - m >= Isa::kTileRows) tile(Constant<Isa::kTileRows>{});
    for_tail<Isa::kTileRows - 1>(m1 - m, tile);
  }
}

template <class Isa>
void sums_int8(const LayerView& layer, const Activations& activations, int64_t m0, int64_t m1, int64_t n0, int64_t n1, float* sums,
               int64_t stride, void* scratch) {
  clear_sums(m1 - m0, n1 - n0, sums, stride);
  switch (m1 - m0) {
    case 1: return stream<Isa, 1>(layer, activations, m0, n0, n1, sums, stride);
    case 2: return stream<Isa, 2>(layer, activations, m0, n0, n1, sums, stride);
    case 3: return stream<Isa, 3>(layer, activations, m0, n0, n1, sums, stride);
    case 4: return stream<Isa, 4>(layer, activations, m0, n0, n1, sums, stride);
    case 5: return stream<Isa, 5>(layer, activations, m0, n0, n1, sums, stride);
    case 6: return stream<Isa, 6>(layer, activations, m0, n0, n1, sums, stride);
    case 7: return stream<Isa, 7>(layer, activations, m0, n0, n1, sums, stride);
    case 8: return stream<Isa, 8>(layer, activations, m0, n0, n1, sums, stride);
    default: break;
  }
  auto* panel = static_cast<uint8_t*>(scratch);
  for (int64_t n = n0; n < n1; n += 48) {
    const int64_t left = n1 - n;
    float* tile = sums + n - n0;
    if (left > 32) panel_sums<Isa, 3>(layer, activations, m0, m1, n, n1, tile, stride, panel);
    else if (left > 16) panel_sums<Isa, 2>(layer, activations, m0, m1, n, n1, tile, stride, panel);
    else panel_sums<Isa, 1>(layer, activations, m0, m1, n, n1, tile, stride, panel);
  }
}

}  // namespace
}  // namespace claq
