// int8 sums of more rows of x: a panel of outputs is decoded and multiplied by tiles of rows, Isa::kTileVectors vectors of outputs at
// a time.
#pragma once

#include "avx512_codes.h"

namespace claq {
namespace {

constexpr int kPanelBytes = 24 * 1024;    // for the first-level cache
constexpr int64_t kPanelSums = 2 * 1024;  // sums that a deep panel may work on, so that they are seldom loaded and stored
constexpr int kShallowTiles = 2;

// The stripe of outputs [n0, n1) and the blocks [first_block, first_block + blocks) that a panel holds: for each tile of outputs and
// each block its groups, a group as kTileVectors vectors (also in a tile of fewer).
struct PanelPlace {
  int64_t first_block, blocks, n0, n1;
};

template <class Isa>
constexpr int64_t kPanelBlock = kGroupsPerBlock * Isa::kTileVectors * 64;  // bytes of a block of a tile

template <class Isa>
constexpr int kPanelParts = kPanelBytes / kPanelBlock<Isa>;  // blocks times tiles of a panel

// The row of `codes` at which a block begins; that of the last one's end, too.
inline int64_t code_row(const LayerView& layer, int64_t block) {
  int s = 0;
  while (s + 1 < layer.segment_count && block >= layer.segments[s + 1].first_block) ++s;
  return layer.segments[s].first_row + (block - layer.segments[s].first_block) * layer.segments[s].width;
}

// Those vectors of outputs that are decoded together; with kTail, `count` of their outputs exist. A group of vector v
// goes to panel[v].
template <class Isa, int kWidth, bool kTail, class Tables>
CLAQ_INLINE void decode_vectors(const Tables& tables, const uint32_t* codes, int64_t row_stride, int64_t count,
                                uint8_t* const* panel) {
  constexpr int kTogether = Isa::template kMostTogether<kWidth>;
  WordsHeld<kWidth, kTail> words[kTogether];
#pragma GCC unroll 2
  for (int v = 0; v < kTogether; ++v) words[v] = {codes + 16 * v, row_stride, first_lanes(count - 16 * v)};
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const auto step = Isa::template step<kWidth, kTogether>(words, i);
#pragma GCC unroll 2
    for (int second = 0; second < 2; ++second) {
      const int group = group_of<kWidth>(i, second);
      __m512i decoded[kTogether];
      if (second) Isa::template decode<kWidth, kTogether, 1>(words, step, i, tables[group], decoded);
      else Isa::template decode<kWidth, kTogether, 0>(words, step, i, tables[group], decoded);
      if constexpr (kTogether == 2) decoded[1] = _mm512_ror_epi32(decoded[1], 16);
#pragma GCC unroll 2
      for (int v = 0; v < kTogether; ++v) _mm512_store_si512(panel[v] + group * Isa::kTileVectors * 64, decoded[v]);
    }
  }
}

template <class Isa, int kWidth>
void decode_block(const LayerView& layer, const Segment& segment, int64_t block, const PanelPlace& place, uint8_t* panel) {
  constexpr int kTogether = Isa::template kMostTogether<kWidth>, kTileVectors = Isa::kTileVectors;
  const int64_t b = block - segment.first_block, stride = layer.out_features;
  const BlockTables<Isa, kWidth, Isa::kHeldTables> tables(layer.table + segment.table_offset + ((b * kBlock) << kWidth));
  const uint32_t* codes = layer.codes + (segment.first_row + b * kWidth) * stride;
  const int64_t tile_bytes = place.blocks * kPanelBlock<Isa>;
  panel += (block - place.first_block) * kPanelBlock<Isa>;
  // As many tiles as vectors are decoded together: whole pairs, of which one may lie in both.
  constexpr int64_t kOutputs = 16 * kTileVectors * kTogether;
  for (int64_t n = place.n0; n < place.n1; n += kOutputs, panel += kTogether * tile_bytes) {
    const auto decode = [&](auto tail) CLAQ_STEP {
      unrolled<kTileVectors>([&](auto step) CLAQ_STEP {
        constexpr int v = step.kValue * kTogether;
        constexpr bool kTail = decltype(tail)::kValue;
        const int64_t count = place.n1 - n - 16 * v;
        if (kTail && count <= 0) return;
        uint8_t* to[kTogether];
#pragma GCC unroll 2
        for (int u = 0; u < kTogether; ++u) to[u] = panel + (v + u) / kTileVectors * tile_bytes + (v + u) % kTileVectors * 64;
        decode_vectors<Isa, kWidth, kTail>(tables, codes + n + 16 * v, stride, count, to);
      });
    };
    if (n + kOutputs <= place.n1) decode(Constant<false>{});
    else decode(Constant<true>{});
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

// Fetches the code words of a tile of a later panel, some at a time while another is multiplied: all at once they would keep what comes
// after them waiting.
template <class Isa>
class CodeFetcher {
 public:
  // Those of the tile at output n; none from `end` on.
  CodeFetcher(const LayerView& layer, int64_t first_block, int64_t blocks, int64_t n, int64_t end)
      : next_(layer.codes + code_row(layer, first_block) * layer.out_features + n), stride_(layer.out_features),
        left_(n < end ? code_row(layer, first_block + blocks) - code_row(layer, first_block) : 0) {}

  int64_t rows() const { return left_; }
  CLAQ_INLINE void fetch(int64_t rows) {
    for (rows = rows < left_ ? rows : left_; rows > 0; --rows, --left_, next_ += stride_) {
#pragma GCC unroll 4
      for (int v = 0; v < Isa::kTileVectors; ++v) _mm_prefetch(reinterpret_cast<const char*>(next_ + 16 * v), _MM_HINT_T1);
    }
  }

 private:
  const uint32_t* next_;
  int64_t stride_, left_;
};

// kRows rows from row `lane` of a tile of kPacked. The sums begin with block 0, and are kept in registers over all blocks of the
// panel: beside the dot products a block then costs a conversion and a multiply-add, and no memory traffic.
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
    for (int v = 0; v < kVectors; ++v) total[i][v] = first_block == 0 ? _mm512_setzero_ps() : _mm512_loadu_ps(sums + i * stride + 16 * v);
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
      for (int v = 0; v < kVectors; ++v) w[v] = Isa::weights(_mm512_load_si512(panel + (g * Isa::kTileVectors + v) * 64));
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
    panel += kPanelBlock<Isa>;
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) _mm512_storeu_ps(sums + i * stride + 16 * v, total[i][v]);
  }
}

template <class Isa, int kVectors>
void multiply_rows(const LayerView& layer, const Activations& activations, int64_t m0, int64_t m1, const PanelPlace& panel_place,
                   const uint8_t* panel, float* sums, int64_t stride, CodeFetcher<Isa>& later) {
  const int64_t fetched = (later.rows() * Isa::kTileRows + m1 - m0 - 1) / (m1 - m0);
  for (int64_t m = m0; m < m1; m += kPackedRows) {
    const PackedPlace place = packed_place(layer, activations, m);
    const auto tile = [&](auto rows) {
      constexpr int kPacked = decltype(rows)::kValue;
      constexpr int kRows = kPacked < Isa::kTileRows ? kPacked : Isa::kTileRows;
      constexpr int kLeft = kPacked % kRows;
      for (int i = 0; i + kRows <= kPacked; i += kRows) {
        later.fetch(fetched);
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
                         int64_t n, const uint8_t* part, float* sums, int64_t stride, CodeFetcher<Isa> later) {
  const int64_t left = (place.n1 - n + 15) / 16;
  for_tail<Isa::kTileVectors>(left < Isa::kTileVectors ? left : Isa::kTileVectors, [&](auto vectors) {
    multiply_rows<Isa, decltype(vectors)::kValue>(layer, activations, m0, m1, place, part, sums, stride, later);
  });
}

// Few rows: a few tiles of outputs after the other over a few blocks, then the blocks below. Rows of code words are read in long runs,
// which decoding waits for least. multiply(place, n, part, sums, later) multiplies the tile at output n of the panel `place`, which
// begins at `part`, by all rows, and has `later` fetch meanwhile.
template <class Isa, class Multiply>
CLAQ_INLINE void shallow_panels(const LayerView& layer, int64_t n0, int64_t n1, float* sums, uint8_t* panel, const Multiply& multiply) {
  constexpr int64_t kTile = 16 * Isa::kTileVectors, kStripe = kShallowTiles * kTile;
  constexpr int64_t kBlocks = Isa::kShallowBlocks;
  static_assert(kBlocks * kShallowTiles <= kPanelParts<Isa>);
  for (int64_t block = 0; block < layer.blocks; block += kBlocks) {
    const int64_t left = layer.blocks - block, blocks = left < kBlocks ? left : kBlocks;
    const int64_t below = left < 2 * kBlocks ? left - blocks : kBlocks;
    for (int64_t n = n0; n < n1; n += kStripe) {
      const PanelPlace place{block, blocks, n, n1 - n < kStripe ? n1 : n + kStripe};
      const bool beside = !layer.fetch_ahead && place.n1 < n1;
      const int64_t later_block = beside ? block : block + blocks, later_blocks = beside ? blocks : below;
      const int64_t later_n = layer.fetch_ahead ? n : beside ? place.n1 : n0;
      decode_panel<Isa>(layer, place, panel);
      for (int64_t t = n; t < place.n1; t += kTile) {
        const uint8_t* part = panel + (t - n) / kTile * blocks * kPanelBlock<Isa>;
        multiply(place, t, part, sums + t - n0, CodeFetcher<Isa>(layer, later_block, later_blocks, later_n + t - n, n1));
      }
    }
  }
}

// More rows: panels of several tiles, narrow and deep if there are many.
template <class Isa, class Multiply>
CLAQ_INLINE void deep_panels(const LayerView& layer, int64_t rows, int64_t n0, int64_t n1, float* sums, uint8_t* panel,
                             const Multiply& multiply) {
  constexpr int64_t kTile = 16 * Isa::kTileVectors, kParts = kPanelParts<Isa>;
  int64_t tiles = kPanelSums / rows / kTile;
  tiles = tiles < 1 ? 1 : tiles > kParts ? kParts : tiles;
  const int64_t depth = kParts / tiles;
  for (int64_t n = n0; n < n1; n += tiles * kTile) {
    PanelPlace place{0, 0, n, n1 - n < tiles * kTile ? n1 : n + tiles * kTile};
    for (; place.first_block < layer.blocks; place.first_block += place.blocks) {
      const int64_t left = layer.blocks - place.first_block;
      place.blocks = left < depth ? left : depth;
      decode_panel<Isa>(layer, place, panel);
      // The next panel is below this one, or the top of the next stripe.
      const int64_t below = left - place.blocks;
      const PanelPlace next = below > 0
                                  ? PanelPlace{place.first_block + place.blocks, below < depth ? below : depth, n, place.n1}
                                  : PanelPlace{0, layer.blocks < depth ? layer.blocks : depth, n + tiles * kTile, n1};
      for (int64_t t = n; t < place.n1; t += kTile) {
        const uint8_t* part = panel + (t - n) / kTile * place.blocks * kPanelBlock<Isa>;
        multiply(place, t, part, sums + t - n0, CodeFetcher<Isa>(layer, next.first_block, next.blocks, next.n0 + t - n, next.n1));
      }
    }
  }
}

template <class Isa>
void panel_sums(const LayerView& layer, const Activations& activations, int64_t m0, int64_t m1, int64_t n0, int64_t n1, float* sums,
                int64_t stride, uint8_t* panel) {
  const auto multiply = [&](const PanelPlace& place, int64_t n, const uint8_t* part, float* to, const CodeFetcher<Isa>& later) CLAQ_STEP {
    multiply_panel_tile<Isa>(layer, activations, m0, m1, place, n, part, to, stride, later);
  };
  if (m1 - m0 <= Isa::kShallowRows) shallow_panels<Isa>(layer, n0, n1, sums, panel, multiply);
  else deep_panels<Isa>(layer, m1 - m0, n0, n1, sums, panel, multiply);
}

}  // namespace
}  // namespace claq
