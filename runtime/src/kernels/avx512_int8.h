// int8 sums for the AVX-512 families; `Isa` says how codes become weights and how weights meet activations:
//
//   load_table<kWidth>(table, group), step<kWidth>(words, i), decode<kWidth, second>(words, step, i, entries): centroids of 16
//     outputs and the four columns of group group_of(i, second), as bytes; `step` is what both groups of a step share;
//   weights(decoded), activation(four), begin(correction), dot(sum, weights, activation): the arithmetic;
//   rows_ahead(width): how many rows of code words ahead they are fetched for a few rows of x; kRowVectors, few_rows_vectors(width):
//     vectors of outputs side by side for a row alone and for two to four;
//   kTileRows, kTileVectors: a register tile of the panels; kShallowRows: up to how many rows panels are shallow (below).
#pragma once

#include "avx512_common.h"

namespace claq {
namespace {

inline __m512i broadcast_four(const int8_t* values) { return _mm512_set1_epi32(*reinterpret_cast<const int32_t*>(values)); }

// The groups that come out of `words` at step i of 0..3.
template <int kWidth>
constexpr int group_of(int i, int second) {
  return kWidth == 4 ? 2 * i + second : i + 4 * second;
}

// sums[16 * v] += dot * factor for a tile's rows.
template <int kRows, int kVectors>
CLAQ_INLINE void add_block(const __m512i (&dot)[kRows][kVectors], const float* scale, float* sums, int64_t stride) {
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

// ---- a few rows of x: codes are read once, in order, and never leave the registers

// What a block's steps share. With one row of x all of it fits into the registers.
template <class Isa, int kWidth, int kRows>
struct BlockOperands {
  static constexpr bool kHeld = kRows == 1;
  const uint8_t* table;
  const int8_t* x;
  typename Isa::Table tables[kHeld ? kGroupsPerBlock : 1];
  typename Isa::Activation activations[kHeld ? kGroupsPerBlock : 1];

  CLAQ_INLINE BlockOperands(const uint8_t* block_table, const int8_t* block_x) : table(block_table), x(block_x) {
    if constexpr (kHeld) {
#pragma GCC unroll 8
      for (int g = 0; g < kGroupsPerBlock; ++g) {
        tables[g] = Isa::template load_table<kWidth>(table, g);
        activations[g] = Isa::activation(x + 4 * g);
      }
    }
  }
  CLAQ_INLINE typename Isa::Table entries(int group) const {
    if constexpr (kHeld) return tables[group];
    else return Isa::template load_table<kWidth>(table, group);
  }
  CLAQ_INLINE typename Isa::Activation activation(int group, int m) const {
    if constexpr (kHeld) return activations[group];
    else return Isa::activation(x + 4 * (kRows * group + m));
  }
};

// The code words of a block for sixteen outputs, loaded where they are used: registers are for sums.
template <bool kTail>
struct WordsInMemory {
  const uint32_t* codes;
  int64_t row_stride;
  __mmask16 mask;
  CLAQ_INLINE __m512i operator[](int i) const { return load_words<kTail>(codes + i * row_stride, mask); }
};

// Whether code words of the next step are fetched while one is decoded, a few at a time; else those of the step itself, at once. By
// measurement on Cascade Lake: 4 % less time for four rows of x, but 3 % more for one row at 4 bits in a cache.
template <int kWidth, int kRows>
constexpr bool kFetchNextStep = kRows > 1 || kWidth < 4;

// One block, 16 * kVectors outputs.
template <class Isa, int kWidth, int kRows, int kVectors, bool kTail>
CLAQ_INLINE void stream_step(const uint32_t* codes, int64_t row_stride, __mmask16 mask, const uint32_t* later,
                             const BlockOperands<Isa, kWidth, kRows>& operands, const float* scale, const int32_t* correction,
                             float* sums, int64_t stride) {
  WordsInMemory<kTail> words[kVectors];
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    words[v] = {codes + 16 * v, row_stride, mask};
    if constexpr (!kFetchNextStep<kWidth, kRows>) {
#pragma GCC unroll 4
      for (int i = 0; i < kWidth; ++i) _mm_prefetch(reinterpret_cast<const char*>(later + i * row_stride + 16 * v), _MM_HINT_T0);
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
    for (int v = 0; v < kVectors; ++v) {
      if (kFetchNextStep<kWidth, kRows> && i < kWidth) {
        _mm_prefetch(reinterpret_cast<const char*>(later + i * row_stride + 16 * v), _MM_HINT_T0);
      }
      steps[v] = Isa::template step<kWidth>(words[v], i);
    }
#pragma GCC unroll 2
    for (int second = 0; second < 2; ++second) {
      const int group = group_of<kWidth>(i, second);
      const auto entries = operands.entries(group);
      typename Isa::Weights w[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        w[v] = Isa::weights(second ? Isa::template decode<kWidth, 1>(words[v], steps[v], i, entries)
                                   : Isa::template decode<kWidth, 0>(words[v], steps[v], i, entries));
      }
#pragma GCC unroll 8
      for (int m = 0; m < kRows; ++m) {
        const auto four = operands.activation(group, m);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) dot[m][v] = Isa::dot(dot[m][v], w[v], four);
      }
    }
  }
  add_block<kRows, kVectors>(dot, scale, sums, stride);
}

template <class Isa, int kWidth, int kRows>
constexpr int kStreamVectors = kRows == 1 ? Isa::kRowVectors : kRows <= 4 ? Isa::few_rows_vectors(kWidth) : 2;

template <class Isa, int kWidth, int kRows>
void stream_segment(const LayerView& layer, const Segment& segment, const PackedPlace& place, int64_t n0, int64_t n1, float* sums,
                    int64_t stride) {
  constexpr int kVectors = kStreamVectors<Isa, kWidth, kRows>;
  const int64_t row_stride = layer.out_features;
  for (int64_t b = 0; b < segment.blocks; ++b) {
    const int64_t block = segment.first_block + b;
    const BlockOperands<Isa, kWidth, kRows> operands(layer.table + segment.table_offset + ((b * kBlock) << kWidth),
                                                     place.quantized + block * kBlock * kRows);
    const float* scale = place.scale + block * kRows;
    const int32_t* correction = place.correction + block * kRows;
    const uint32_t* codes = layer.codes + (segment.first_row + b * kWidth) * row_stride;
    constexpr int64_t kStep = 16 * kVectors, kNext = kFetchNextStep<kWidth, kRows> ? kStep : 0;
    const uint32_t* below = codes + kWidth * row_stride;
    const uint32_t* later = codes + (layer.fetch_ahead ? Isa::rows_ahead(kWidth) * row_stride : kNext);
    int64_t n = n0;
    for (; n + kStep <= n1; n += kStep) {
      const uint32_t* fetched = later + n;
      if (kNext > 0 && !layer.fetch_ahead && n + kStep + kNext > n1) fetched = below + n0;
      stream_step<Isa, kWidth, kRows, kVectors, false>(codes + n, row_stride, 0xffff, fetched, operands, scale, correction,
                                                       sums + n - n0, stride);
    }
    for (; n < n1; n += 16) {
      stream_step<Isa, kWidth, kRows, 1, true>(codes + n, row_stride, first_lanes(n1 - n), later + n, operands, scale, correction,
                                               sums + n - n0, stride);
    }
  }
}

template <class Isa, int kRows>
void stream(const LayerView& layer, const PackedPlace& place, int64_t n0, int64_t n1, float* sums, int64_t stride) {
  for (int s = 0; s < layer.segment_count; ++s) {
    const Segment& segment = layer.segments[s];
    switch (segment.width) {
      case 4: stream_segment<Isa, 4, kRows>(layer, segment, place, n0, n1, sums, stride); break;
      case 3: stream_segment<Isa, 3, kRows>(layer, segment, place, n0, n1, sums, stride); break;
      default: stream_segment<Isa, 2, kRows>(layer, segment, place, n0, n1, sums, stride); break;
    }
  }
}

// ---- more rows: a panel of outputs is decoded and multiplied by tiles of rows, Isa::kTileVectors vectors of outputs at a time

constexpr int kPanelBytes = 24 * 1024;    // for the first-level cache
constexpr int64_t kPanelSums = 2 * 1024;  // sums that a deep panel may work on, so that they are seldom loaded and stored
constexpr int kShallowBlocks = 4;

template <class Isa>
constexpr int kPanelParts = kPanelBytes / (kGroupsPerBlock * 64 * Isa::kTileVectors);  // blocks times tiles of a panel

// `later`: code words to fetch meanwhile, or null.
template <class Isa, int kWidth, int kVectors>
CLAQ_INLINE void decode_tile(const typename Isa::Table (&entries)[kGroupsPerBlock], const uint32_t* codes, int64_t row_stride,
                             int64_t count, const uint32_t* later, uint8_t* panel) {
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    __m512i words[kWidth];
    if (later) {
#pragma GCC unroll 4
      for (int i = 0; i < kWidth; ++i) {
        _mm_prefetch(reinterpret_cast<const char*>(later + i * row_stride + 16 * v), _MM_HINT_T0);
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < kWidth; ++i) {
      words[i] = load_words<true>(codes + i * row_stride + 16 * v, first_lanes(count - 16 * v));
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
  bool fetch_below;  // while it is decoded, fetch the code words of as many blocks below it
};

// How many vectors the next tile of `left` outputs has.
template <int kMost>
inline int64_t vectors_of(int64_t left) {
  return left > 16 * (kMost - 1) ? kMost : (left + 15) / 16;
}

// The row of `codes` at which a block begins; that of the last one's end, too.
inline int64_t code_row(const LayerView& layer, int64_t block) {
  int s = 0;
  while (s + 1 < layer.segment_count && block >= layer.segments[s + 1].first_block) ++s;
  return layer.segments[s].first_row + (block - layer.segments[s].first_block) * layer.segments[s].width;
}

template <class Isa, int kWidth>
void decode_block(const LayerView& layer, const Segment& segment, int64_t block, const PanelPlace& place, uint8_t* panel) {
  const int64_t b = block - segment.first_block;
  const uint8_t* table = layer.table + segment.table_offset + ((b * kBlock) << kWidth);
  typename Isa::Table entries[kGroupsPerBlock];
#pragma GCC unroll 8
  for (int g = 0; g < kGroupsPerBlock; ++g) entries[g] = Isa::template load_table<kWidth>(table, g);
  const int64_t stride = layer.out_features;
  const uint32_t* codes = layer.codes + (segment.first_row + b * kWidth) * stride;
  const uint32_t* below = place.fetch_below ? codes + place.blocks * kWidth * stride : nullptr;
  constexpr int kTileVectors = Isa::kTileVectors;
  for (int64_t n = place.n0; n < place.n1; n += 16 * kTileVectors) {
    const int64_t tile = (n - place.n0) / (16 * kTileVectors);
    uint8_t* to = panel + tile * place.blocks * kTileVectors * kGroupsPerBlock * 64;
    const int64_t left = place.n1 - n;
    for_tail<kTileVectors>(vectors_of<kTileVectors>(left), [&](auto vectors) {
      constexpr int kVectors = decltype(vectors)::kValue;
      decode_tile<Isa, kWidth, kVectors>(entries, codes + n, stride, left, below ? below + n : nullptr,
                                         to + (block - place.first_block) * kGroupsPerBlock * kVectors * 64);
    });
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

// Fetches the code words of one tile of a panel, while another is multiplied: all at once they would keep the decoder waiting.
template <class Isa>
inline void fetch_tile(const LayerView& layer, const PanelPlace& place, int64_t n) {
  const int64_t first = code_row(layer, place.first_block), last = code_row(layer, place.first_block + place.blocks);
  for (int64_t row = first; row < last; ++row) {
    const uint32_t* words = layer.codes + row * layer.out_features + n;
#pragma GCC unroll 4
    for (int v = 0; v < Isa::kTileVectors; ++v) _mm_prefetch(reinterpret_cast<const char*>(words + 16 * v), _MM_HINT_T0);
  }
}

// kRows rows from row `lane` of a tile of kPacked. The sums are kept in registers over all blocks of the panel: beside the
// dot products a block then costs a conversion and a multiply-add, and no memory traffic.
template <class Isa, int kPacked, int kRows, int kVectors>
void multiply_tile(const PackedPlace& place, int lane, int64_t first_block, int64_t blocks, const uint8_t* panel, float* sums,
                   int64_t stride) {
  const int8_t* x = place.quantized + first_block * kBlock * kPacked + 4 * lane;
  const float* scale = place.scale + first_block * kPacked + lane;
  const int32_t* correction = place.correction + first_block * kPacked + lane;
  __m512 total[kRows][kVectors];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) total[i][v] = _mm512_loadu_ps(sums + i * stride + 16 * v);
  }
  for (int64_t b = 0; b < blocks; ++b) {
    __m512i acc[kRows][kVectors];
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) acc[i][v] = Isa::begin(correction[i]);
    }
#pragma GCC unroll 8
    for (int g = 0; g < kGroupsPerBlock; ++g) {
      typename Isa::Weights w[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) w[v] = Isa::weights(_mm512_load_si512(panel + (g * kVectors + v) * 64));
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
        const auto four = Isa::activation(x + 4 * (g * kPacked + i));
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) acc[i][v] = Isa::dot(acc[i][v], w[v], four);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const __m512 factor = _mm512_set1_ps(scale[i]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) total[i][v] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc[i][v]), factor, total[i][v]);
    }
    x += kBlock * kPacked;
    scale += kPacked;
    correction += kPacked;
    panel += kGroupsPerBlock * kVectors * 64;
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) _mm512_storeu_ps(sums + i * stride + 16 * v, total[i][v]);
  }
}

template <class Isa, int kVectors>
void multiply_rows(const LayerView& layer, const Activations& activations, int64_t m0, int64_t m1, const PanelPlace& panel_place,
                   const uint8_t* panel, float* sums, int64_t stride) {
  for (int64_t m = m0; m < m1; m += kPackedRows) {
    const PackedPlace place = packed_place(layer, activations, m);
    const auto tile = [&](auto rows) {
      constexpr int kPacked = decltype(rows)::kValue;
      constexpr int kRows = kPacked < Isa::kTileRows ? kPacked : Isa::kTileRows;
      constexpr int kLeft = kPacked % kRows;
      for (int i = 0; i + kRows <= kPacked; i += kRows) {
        multiply_tile<Isa, kPacked, kRows, kVectors>(place, i, panel_place.first_block, panel_place.blocks, panel,
                                                     sums + (m - m0 + i) * stride, stride);
      }
      if constexpr (kLeft > 0) {
        multiply_tile<Isa, kPacked, kLeft, kVectors>(place, kPacked - kLeft, panel_place.first_block, panel_place.blocks, panel,
                                                     sums + (m - m0 + kPacked - kLeft) * stride, stride);
      }
    };
    for_tail<kPackedRows>(place.rows, tile);
  }
}

template <class Isa>
void multiply_panel_tile(const LayerView& layer, const Activations& activations, int64_t m0, int64_t m1, const PanelPlace& place,
                         int64_t n, const uint8_t* part, float* sums, int64_t stride) {
  for_tail<Isa::kTileVectors>(vectors_of<Isa::kTileVectors>(place.n1 - n), [&](auto vectors) {
    multiply_rows<Isa, decltype(vectors)::kValue>(layer, activations, m0, m1, place, part, sums, stride);
  });
}

// Few rows: one tile of outputs after the other over a few blocks, then the blocks below. Rows of code words are read in long
// runs, which decoding waits for least.
template <class Isa>
void shallow_panel_sums(const LayerView& layer, const Activations& activations, int64_t m0, int64_t m1, int64_t n0, int64_t n1,
                        float* sums, int64_t stride, uint8_t* panel) {
  constexpr int64_t kTile = 16 * Isa::kTileVectors;
  for (int64_t block = 0; block < layer.blocks; block += kShallowBlocks) {
    const int64_t left = layer.blocks - block, blocks = left < kShallowBlocks ? left : kShallowBlocks;
    const bool fetch = layer.fetch_ahead && left >= 2 * kShallowBlocks;
    for (int64_t n = n0; n < n1; n += kTile) {
      const PanelPlace place{block, blocks, n, n1 - n < kTile ? n1 : n + kTile, fetch};
      decode_panel<Isa>(layer, place, panel);
      multiply_panel_tile<Isa>(layer, activations, m0, m1, place, n, panel, sums + n - n0, stride);
    }
  }
}

// More rows: panels of several tiles, narrow and deep if there are many.
template <class Isa>
void deep_panel_sums(const LayerView& layer, const Activations& activations, int64_t m0, int64_t m1, int64_t n0, int64_t n1,
                     float* sums, int64_t stride, uint8_t* panel) {
  constexpr int64_t kTile = 16 * Isa::kTileVectors, kParts = kPanelParts<Isa>;
  int64_t tiles = kPanelSums / (m1 - m0) / kTile;
  tiles = tiles < 1 ? 1 : tiles > kParts ? kParts : tiles;
  const int64_t depth = kParts / tiles;
  for (int64_t n = n0; n < n1; n += tiles * kTile) {
    PanelPlace place{0, 0, n, n1 - n < tiles * kTile ? n1 : n + tiles * kTile, false};
    for (; place.first_block < layer.blocks; place.first_block += place.blocks) {
      const int64_t left = layer.blocks - place.first_block;
      place.blocks = left < depth ? left : depth;
      decode_panel<Isa>(layer, place, panel);
      // The next panel is below this one, or the top of the next stripe.
      const int64_t below = left - place.blocks;
      const PanelPlace next = below > 0
                                  ? PanelPlace{place.first_block + place.blocks, below < depth ? below : depth, n, place.n1, false}
                                  : PanelPlace{0, layer.blocks < depth ? layer.blocks : depth, n + tiles * kTile, n1, false};
      for (int64_t t = n; t < place.n1; t += kTile) {
        if (next.n0 + t - n < next.n1) fetch_tile<Isa>(layer, next, next.n0 + t - n);
        const uint8_t* part = panel + (t - n) / kTile * place.blocks * Isa::kTileVectors * kGroupsPerBlock * 64;
        multiply_panel_tile<Isa>(layer, activations, m0, m1, place, t, part, sums + t - n0, stride);
      }
    }
  }
}

template <class Isa>
void sums_int8(const LayerView& layer, const Activations& activations, int64_t m0, int64_t m1, int64_t n0, int64_t n1, float* sums,
               int64_t stride, void* scratch) {
  clear_sums(m1 - m0, n1 - n0, sums, stride);
  if (m1 - m0 > kPackedRows) {
    const auto panel_sums = m1 - m0 <= Isa::kShallowRows ? shallow_panel_sums<Isa> : deep_panel_sums<Isa>;
    return panel_sums(layer, activations, m0, m1, n0, n1, sums, stride, static_cast<uint8_t*>(scratch));
  }
  const PackedPlace place = packed_place(layer, activations, m0);
  for_tail<kPackedRows>(place.rows, [&](auto rows) { stream<Isa, decltype(rows)::kValue>(layer, place, n0, n1, sums, stride); });
}

}  // namespace
}  // namespace claq
