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
constexpr int kBlocksAhead = 2;

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
  constexpr int kVectors = kRows <= 4 ? 4 : 2;
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

// ---- more rows: a panel of outputs is decoded and multiplied by tiles of rows, 48 outputs at a time

constexpr int kPanelVectors = 3;           // of a tile; its sums are kVectors * kTileRows registers
constexpr int kPanelParts = 16;            // blocks times tiles of a panel: 24 KiB, for the first-level cache
constexpr int64_t kPanelSums = 6 * 1024;   // sums that a panel may work on, likewise

template <class Isa, int kWidth, int kVectors>
inline void decode_tile(const typename Isa::Table (&entries)[kGroupsPerBlock], const uint32_t* codes, int64_t row_stride,
                        const uint32_t* later, int64_t count, uint8_t* panel) {
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    __m512i words[kWidth];
#pragma GCC unroll 4
    for (int i = 0; i < kWidth; ++i) {
      words[i] = load_words<true>(codes + i * row_stride + 16 * v, first_lanes(count - 16 * v));
      _mm_prefetch(reinterpret_cast<const char*>(later + i * row_stride + 16 * v), _MM_HINT_T1);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const auto step = Isa::template step<kWidth>(words, i);
      const int first = group_of<kWidth>(i, 0), second = group_of<kWidth>(i, 1);
      _mm512_store_si512(panel + (first * kVectors + v) * 64, Isa::template decode<kWidth, 0>(words, step, i, entries[first]));
      _mm512_store_si512(panel + (second * kVectors + v) * 64, Isa::template decode<kWidth, 1>(words, step, i, entries[second]));
    }
  }
}

// The stripe of outputs [n0, n1) and the blocks [first_block, first_block + blocks) that a panel holds, tile after tile.
struct PanelPlace {
  int64_t first_block, blocks, n0, n1;
};

template <class Isa, int kWidth>
void decode_block(const LayerView& layer, const Segment& segment, int64_t block, const PanelPlace& place, uint8_t* panel) {
  const int64_t b = block - segment.first_block;
  const uint8_t* table = layer.table + segment.table_offset + ((b * kBlock) << kWidth);
  typename Isa::Table entries[kGroupsPerBlock];
#pragma GCC unroll 8
  for (int g = 0; g < kGroupsPerBlock; ++g) entries[g] = Isa::template load_table<kWidth>(table, g);
  const int64_t stride = layer.out_features;
  const uint32_t* codes = layer.codes + (segment.first_row + b * kWidth) * stride;
  // What is decoded a panel later: these outputs further down, or at the bottom the next ones at the top.
  const int64_t ahead = place.blocks < kBlocksAhead ? kBlocksAhead : place.blocks;
  const bool below = b + ahead < segment.blocks;
  const uint32_t* later = below ? codes + ahead * kWidth * stride
                                : layer.codes + (segment.first_row + b % ahead * kWidth) * stride + (place.n1 - place.n0);
  for (int64_t n = place.n0; n < place.n1; n += 16 * kPanelVectors) {
    const int64_t tile = (n - place.n0) / (16 * kPanelVectors);
    uint8_t* to = panel + tile * place.blocks * kPanelVectors * kGroupsPerBlock * 64;
    const int64_t left = place.n1 - n;
    const auto decode = [&](auto vectors) {
      constexpr int kVectors = decltype(vectors)::kValue;
      decode_tile<Isa, kWidth, kVectors>(entries, codes + n, stride, later + n, left,
                                         to + (block - place.first_block) * kGroupsPerBlock * kVectors * 64);
    };
    if (left > 32) decode(Constant<3>{});
    else if (left > 16) decode(Constant<2>{});
    else decode(Constant<1>{});
  }
}

template <class Isa>
void decode_panel(const LayerView& layer, const PanelPlace& place, uint8_t* panel) {
  for (int s = 0; s < layer.segment_count; ++s) {
    const Segment& segment = layer.segments[s];
    for (int64_t block = place.first_block; block < place.first_block + place.blocks; ++block) {
      if (block < segment.first_block || block >= segment.first_block + segment.blocks) continue;
      switch (segment.width) {
        case 4: decode_block<Isa, 4>(layer, segment, block, place, panel); break;
        case 3: decode_block<Isa, 3>(layer, segment, block, place, panel); break;
        default: decode_block<Isa, 2>(layer, segment, block, place, panel); break;
      }
    }
  }
}

template <class Isa, int kRows, int kVectors>
inline void multiply_tile(const Activations& activations, int64_t m, int64_t first_block, int64_t blocks, const uint8_t* panel,
                          float* sums, int64_t stride) {
  const int8_t* x = activations.quantized + m * activations.stride + first_block * kBlock;
  const float* scale = activations.block_scale + m * activations.block_stride + first_block;
  const int32_t* correction = activations.block_correction + m * activations.block_stride + first_block;
  for (int64_t b = 0; b < blocks; ++b) {
    __m512i acc[kRows][kVectors];
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
void multiply_rows(const Activations& activations, int64_t m0, int64_t m1, const PanelPlace& place, const uint8_t* panel, float* sums,
                   int64_t stride) {
  int64_t m = m0;
  const auto tile = [&](auto rows) {
    constexpr int kRows = decltype(rows)::kValue;
    multiply_tile<Isa, kRows, kVectors>(activations, m, place.first_block, place.blocks, panel, sums + (m - m0) * stride, stride);
    m += kRows;
  };
  while (m1 - m >= Isa::kTileRows) tile(Constant<Isa::kTileRows>{});
  for_tail<Isa::kTileRows - 1>(m1 - m, tile);
}

template <class Isa>
void panel_sums(const LayerView& layer, const Activations& activations, int64_t m0, int64_t m1, int64_t n0, int64_t n1, float* sums,
                int64_t stride, uint8_t* panel) {
  constexpr int64_t kTile = 16 * kPanelVectors;
  // Few rows: wide and shallow, because decoding dominates and wants long rows of codes. Many: narrow and deep.
  int64_t tiles = kPanelSums / (m1 - m0) / kTile;
  tiles = tiles < 1 ? 1 : tiles > kPanelParts ? kPanelParts : tiles;
  for (int64_t n = n0; n < n1; n += tiles * kTile) {
    PanelPlace place{0, 0, n, n1 - n < tiles * kTile ? n1 : n + tiles * kTile};
    for (; place.first_block < layer.blocks; place.first_block += place.blocks) {
      const int64_t left = layer.blocks - place.first_block;
      place.blocks = left < kPanelParts / tiles ? left : kPanelParts / tiles;
      decode_panel<Isa>(layer, place, panel);
      for (int64_t t = n; t < place.n1; t += kTile) {
        const uint8_t* part = panel + (t - n) / kTile * place.blocks * kPanelVectors * kGroupsPerBlock * 64;
        float* to = sums + t - n0;
        if (place.n1 - t > 32) multiply_rows<Isa, 3>(activations, m0, m1, place, part, to, stride);
        else if (place.n1 - t > 16) multiply_rows<Isa, 2>(activations, m0, m1, place, part, to, stride);
        else multiply_rows<Isa, 1>(activations, m0, m1, place, part, to, stride);
      }
    }
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
    default: return panel_sums<Isa>(layer, activations, m0, m1, n0, n1, sums, stride, static_cast<uint8_t*>(scratch));
  }
}

}  // namespace
}  // namespace claq
