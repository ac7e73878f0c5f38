// int8 sums of some rows of x by tiles, without panels: codes are read once, in order, as in avx512_stream.h. What tile instructions cost
// depends little on how full the tiles are, so two blocks of columns share a product: their centroids lie below each other in a tile of
// sixteen groups, and each row of x stands twice in the other tile, once with its columns of the first block and zeros, once with zeros and
// those of the second. The blocks' sums come out apart, and are scaled and added one after the other, as in the other families.
#pragma once

#include "amx_tiles.h"
#include "avx512_codes.h"

namespace claq {
namespace {

// Where PackedPlace has the words of a block of kRows rows: lanes of two rows, row 2 * i first, from four vectors taken two and two.
template <int kRows>
struct RowOrder {
  static constexpr int kPairs = (kRows + 1) / 2;
  int32_t lane[kPairs][16];
  uint16_t from_upper[kPairs];

  constexpr RowOrder() : lane{}, from_upper{} {
    for (int i = 0; i < kPairs; ++i) {
      for (int j = 0; j < 16; ++j) {
        const int row = 2 * i + j / kGroupsPerBlock < kRows ? 2 * i + j / kGroupsPerBlock : 2 * i;
        const int word = j % kGroupsPerBlock * kRows + row;
        lane[i][j] = word % 32;
        if (word >= 32) from_upper[i] = static_cast<uint16_t>(from_upper[i] | 1 << j);
      }
    }
  }
};

template <int kRows>
alignas(64) constexpr RowOrder<kRows> kRowOrder;

// The rows of a block, kBlock bytes each, 64 bytes from one to the next.
template <int kRows>
CLAQ_INLINE void spread_rows(const int8_t* x, int8_t* to) {
  constexpr int kWords = kGroupsPerBlock * kRows;
  __m512 words[4];
  unrolled<4>([&](auto i) CLAQ_STEP {
    words[i.kValue] = _mm512_castsi512_ps(_mm512_maskz_loadu_epi32(first_lanes(kWords - 16 * i.kValue), x + 64 * i.kValue));
  });
  const auto& order = kRowOrder<kRows>;
  unrolled<RowOrder<kRows>::kPairs>([&](auto i) CLAQ_STEP {
    constexpr int kRow = 2 * decltype(i)::kValue;
    const __m512i lanes = _mm512_load_si512(order.lane[i.kValue]);
    const __m512 rows = _mm512_mask_blend_ps(order.from_upper[i.kValue], _mm512_permutex2var_ps(words[0], lanes, words[1]),
                                             _mm512_permutex2var_ps(words[2], lanes, words[3]));
    _mm256_storeu_ps(reinterpret_cast<float*>(to + 64 * kRow), _mm512_castps512_ps256(rows));
    if constexpr (kRow + 1 < kRows) {
      _mm256_storeu_ps(reinterpret_cast<float*>(to + 64 * (kRow + 1)), _mm512_extractf32x8_ps(rows, 1));
    }
  });
}

constexpr int kStreamedVectors = 2;  // of outputs, decoded side by side
constexpr int64_t kStreamedOutputs = 16 * kStreamedVectors;
constexpr int64_t kStreamedTile = 2 * kGroupsPerBlock * 64;  // bytes of the centroids of two blocks and sixteen outputs

// A block's half of the tiles of kStreamedOutputs outputs, of which with kTail `count` exist. `later` is fetched meanwhile.
template <class Isa, int kWidth, bool kTail>
CLAQ_INLINE void decode_half(const uint32_t* codes, int64_t row_stride, int64_t count, const uint32_t* later, const __m512i* tables,
                             uint8_t* to) {
  WordsInMemory<kTail> words[kStreamedVectors];
  unrolled<kStreamedVectors>([&](auto v) CLAQ_STEP {
    words[v.kValue] = {codes + 16 * v.kValue, row_stride, kTail ? first_lanes(count - 16 * v.kValue) : __mmask16{0xffff}};
  });
  unrolled<4>([&](auto i) CLAQ_STEP {
    typename Isa::template Step<kWidth> steps[kStreamedVectors];
    unrolled<kStreamedVectors>([&](auto v) CLAQ_STEP {
      if constexpr (i.kValue < kWidth) {
        _mm_prefetch(reinterpret_cast<const char*>(later + i.kValue * row_stride + 16 * v.kValue), _MM_HINT_T0);
      }
      steps[v.kValue] = Isa::template step<kWidth, 1>(words + v.kValue, i.kValue);
    });
    unrolled<2>([&](auto second) CLAQ_STEP {
      constexpr int kGroup = group_of<kWidth>(decltype(i)::kValue, decltype(second)::kValue);
      const __m512i entries = _mm512_load_si512(tables + kGroup);
      unrolled<kStreamedVectors>([&](auto v) CLAQ_STEP {
        __m512i decoded;
        Isa::template decode<kWidth, 1, decltype(second)::kValue>(words + v.kValue, steps[v.kValue], i.kValue, entries, &decoded);
        _mm512_store_si512(to + kStreamedTile * v.kValue + 64 * kGroup, decoded);
      });
    });
  });
}

// A product that is not yet added: to which sums, and the rows' scales in either block.
struct BegunProduct {
  float* sums;
  const float* scale[2];
};

template <int kRows>
CLAQ_INLINE void add_product(const BegunProduct& begun, const int32_t* product, int64_t stride) {
  unrolled<kRows>([&](auto m) CLAQ_STEP {
    float* sum = begun.sums + m.kValue * stride;
    const __m512 first = _mm512_cvtepi32_ps(_mm512_load_si512(product + 16 * m.kValue));
    const __m512 second = _mm512_cvtepi32_ps(_mm512_load_si512(product + 16 * (kRows + m.kValue)));
    const __m512 one = _mm512_fmadd_ps(first, _mm512_set1_ps(begun.scale[0][m.kValue]), _mm512_loadu_ps(sum));
    _mm512_storeu_ps(sum, _mm512_fmadd_ps(second, _mm512_set1_ps(begun.scale[1][m.kValue]), one));
  });
}

// The tile registers.
constexpr int kStreamedX = 0, kStreamedWeights = 2, kStreamedSums = 4;

template <class Isa, int kWidth, int kRows>
void stream_segment_by_tiles(const LayerView& layer, const Segment& segment, const PackedPlace& place, int64_t n0, int64_t n1, float* sums,
                             int64_t stride) {
  static const float kNoScale[kRows] = {};
  alignas(64) int8_t x[2 * kRows * 64] = {};
  alignas(64) __m512i tables[2][kGroupsPerBlock];
  alignas(64) uint8_t weights[2][kStreamedVectors * kStreamedTile];
  alignas(64) int32_t products[kProducts][2 * kRows * 16];
  BegunProduct begun[kProducts];
  int64_t count = 0;  // of begun products
  const auto begin = [&](auto parity, const uint8_t* tile, const BegunProduct& product) CLAQ_STEP {
    constexpr int kParity = decltype(parity)::kValue;
    begun[count % kProducts] = product;
    load_tile<kStreamedWeights + kParity>(tile, 64);
    zero_tile<kStreamedSums + kParity>();
    add_signed_products<kStreamedSums + kParity, kStreamedX, kStreamedWeights + kParity>();
    if (count > 0) store_tile<kStreamedSums + 1 - kParity>(products[(count - 1) % kProducts], 64);
    if (count >= kConverted) add_product<kRows>(begun[(count - kConverted) % kProducts], products[(count - kConverted) % kProducts], stride);
    ++count;
  };
  const int64_t row_stride = layer.out_features;
  for (int64_t b = 0; b < segment.blocks; b += 2) {
    const bool alone = b + 1 == segment.blocks;  // the last one of an odd number: beside it stand zeros
    const int64_t block = segment.first_block + b;
    const int8_t* from = place.quantized + block * kBlock * kRows;
    const uint8_t* table = layer.table + segment.table_offset + ((b * kBlock) << kWidth);
    const uint32_t* codes = layer.codes + (segment.first_row + b * kWidth) * row_stride;
    const uint32_t* codes_beside = alone ? codes : codes + kWidth * row_stride;
    const float* scale = place.scale + block * kRows;
    spread_rows<kRows>(from, x);
    if (alone) {
      for (int i = kRows; i < 2 * kRows; ++i) _mm512_store_si512(x + 64 * i, _mm512_setzero_si512());
    } else {
      spread_rows<kRows>(from + kBlock * kRows, x + 64 * kRows + kBlock);
    }
    load_tile<kStreamedX>(x, 64);
    for (int g = 0; g < kGroupsPerBlock; ++g) {
      tables[0][g] = Isa::template load_table<kWidth>(table, g);
      if (!alone) tables[1][g] = Isa::template load_table<kWidth>(table + (kBlock << kWidth), g);
    }
    const uint32_t* below = codes + 2 * kWidth * row_stride;
    const auto step = [&](int64_t n, auto tail) CLAQ_STEP {
      constexpr bool kTail = decltype(tail)::kValue;
      // Of the pair below where the codes come from memory, else of the next step.
      const uint32_t* later = layer.fetch_ahead ? below + n : n + 2 * kStreamedOutputs > n1 ? below + n0 : codes + n + kStreamedOutputs;
      uint8_t* tiles = weights[count / kStreamedVectors % 2];
      decode_half<Isa, kWidth, kTail>(codes + n, row_stride, n1 - n, later, tables[0], tiles);
      decode_half<Isa, kWidth, kTail>(codes_beside + n, row_stride, n1 - n, later + kWidth * row_stride, tables[alone ? 0 : 1],
                                      tiles + kGroupsPerBlock * 64);
      unrolled<kStreamedVectors>([&](auto v) CLAQ_STEP {
        begin(v, tiles + kStreamedTile * v.kValue, BegunProduct{sums + n - n0 + 16 * v.kValue, {scale, alone ? kNoScale : scale + kRows}});
      });
    };
    int64_t n = n0;
    for (; n + kStreamedOutputs <= n1; n += kStreamedOutputs) step(n, Constant<0>());
    if (n < n1) step(n, Constant<1>());
  }
  store_tile<kStreamedSums + 1>(products[(count - 1) % kProducts], 64);
  for (int64_t i = count < kConverted ? 0 : count - kConverted; i < count; ++i) {
    add_product<kRows>(begun[i % kProducts], products[i % kProducts], stride);
  }
}

// Adds to sums as stream does. `Isa` decodes centroids without the 128 that VNNI wants.
template <class Isa, int kRows>
void stream_by_tiles(const LayerView& layer, const PackedPlace& place, int64_t n0, int64_t n1, float* sums, int64_t stride) {
  constexpr TileShape kX{2 * kRows, 64}, kWeights{2 * kGroupsPerBlock, 64}, kNone{0, 0};
  configure_tiles({kX, kNone, kWeights, kWeights, kX, kX, kNone, kNone});
  for_segments(layer, [&](const Segment& segment, auto width) CLAQ_STEP {
    stream_segment_by_tiles<Isa, decltype(width)::kValue, kRows>(layer, segment, place, n0, n1, sums, stride);
  });
  release_tiles();
}

}  // namespace
}  // namespace claq
