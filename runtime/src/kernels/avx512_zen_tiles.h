// int8 sums of five rows of x and more on AMD's cores with VBMI and VNNI: code words are decoded in registers for eight rows, and again
// for the next eight. Dot products fill two of the four pipes, and decoding mostly takes the others; a panel of decoded weights
// (avx512_panels.h) costs stores, each of which takes two cycles, and only from some number of rows on is it worth them.
#pragma once

#include "avx512_zen.h"

namespace claq {
namespace {

constexpr int kZenTileVectors = 2;      // of outputs
constexpr int64_t kZenTileBlocks = 24;  // that a tile goes through: its code words stay in the first-level cache for the next rows
constexpr int64_t kZenTilesAhead = 2;   // that code words are fetched ahead, to that cache
// The same of code words in memory, to the second-level cache: the first waits for too few lines at a time, and without this layers of few
// outputs took up to 1.5 times as long.
constexpr int64_t kZenFarTilesAhead = 4;
constexpr int64_t kZenMostTileRows = 48;
constexpr int64_t kZenMostThirdBitTileRows = 16;  // of layers with columns of 3 bits, whose decoding takes longer

// At 3 bits an index into a column's eight entries is made without multishift, which needs the pipes of dot products:
//
//   groups of steps 0 and 1     bits 0, 1: third bits of both steps    2, 3: the code's low bits         4, 5: the column's place among four
//   groups of steps 2 and 3     bits 0, 1: the code's low bits         2, 3: third bits of both steps    4, 5: the column's place
//
// This is where each of 64 entries is found in the table of a group, which repeats what does not depend on the other step's third bit.
struct TileIndexOrder {
  uint8_t of_step[4][64];
  constexpr TileIndexOrder() : of_step() {
    for (int i = 0; i < 4; ++i) {
      for (int index = 0; index < 64; ++index) {
        const int first = index & 3, second = (index >> 2) & 3;
        const int code = i < 2 ? second + 4 * ((first >> i) & 1) : first + 4 * ((second >> (i - 2)) & 1);
        of_step[i][index] = static_cast<uint8_t>(8 * (index >> 4) + code);
      }
    }
  }
};
constexpr TileIndexOrder kTileIndexOrder;

// Third bits of half a block's columns at 3 bits: those of columns 4 * j to 4 * j + 3 of sixteen come to the low bits of byte j.
template <int kHalf>
CLAQ_INLINE __m512i third_bits(__m512i words) {
  constexpr int64_t kBytes = kHalf ? 0x0303020203030202 : 0x0101000001010000;
  const __m128i order = _mm_set_epi64x(kBytes + 0x0c0c0c0c08080808, kBytes + 0x0404040400000000);  // of four outputs' words
  const __m512i twice = _mm512_shuffle_epi8(words, _mm512_broadcast_i32x4(order));
  return _mm512_ternarylogic_epi32(_mm512_srli_epi32(twice, 4), twice, _mm512_set1_epi32(static_cast<int>(0xff00ff00)), 0xe4);
}

// Decodes a block of kVectors vectors of outputs: use(Constant<group>(), its weights [kVectors]) for each group. begin(Constant<i>()) comes
// before what is decoded in quarter i.
template <int kWidth, int kVectors, class Words, class Begin, class Use>
CLAQ_INLINE void for_groups(const Words (&words)[kVectors], const uint8_t* table, const Begin& begin, const Use& use) {
  if constexpr (kWidth != 3) {
    unrolled<4>([&](auto i) CLAQ_STEP {
      begin(i);
      unrolled<2>([&](auto second) CLAQ_STEP {
        constexpr int kSecond = decltype(second)::kValue, kGroup = group_of<kWidth>(decltype(i)::kValue, kSecond);
        const __m512i entries = Vnni::load_table<kWidth>(table, kGroup);
        __m512i decoded[kVectors];
        unrolled<kVectors>([&](auto v) CLAQ_STEP {
          Vnni::decode<kWidth, 1, kSecond>(words + v.kValue, __m512i{}, i.kValue, entries, decoded + v.kValue);
        });
        use(Constant<kGroup>(), decoded);
      });
    });
    return;
  }
  unrolled<2>([&](auto half) CLAQ_STEP {
    constexpr int kHalf = decltype(half)::kValue;
    __m512i thirds[kVectors];
    unrolled<kVectors>([&](auto v) CLAQ_STEP { thirds[v.kValue] = third_bits<kHalf>(words[v.kValue][2]); });
    unrolled<2>([&](auto pair) CLAQ_STEP {
      constexpr int kPair = decltype(pair)::kValue, kQuarter = 2 * kHalf + kPair;
      begin(Constant<kQuarter>());
      __m512i high[kVectors];  // an index but for the code's low bits
      unrolled<kVectors>([&](auto v) CLAQ_STEP {
        const __m512i places = _mm512_set1_epi32(0x30201000);
        high[v.kValue] = _mm512_ternarylogic_epi32(thirds[v.kValue], _mm512_set1_epi8(kPair ? 12 : 3), places, 0xea);
      });
      unrolled<2>([&](auto step) CLAQ_STEP {
        constexpr int kStep = 2 * kPair + decltype(step)::kValue, kGroup = group_of<3>(kStep, kHalf);
        const __m512i order = _mm512_loadu_si512(kTileIndexOrder.of_step[kStep]);
        const __m512i entries = _mm512_permutexvar_epi8(order, Vnni::load_table<3>(table, kGroup));
        __m512i decoded[kVectors];
        unrolled<kVectors>([&](auto v) CLAQ_STEP {
          const __m512i word = words[v.kValue][kHalf];
          const __m512i low = kStep == 0 ? _mm512_slli_epi32(word, 2) : kStep == 1 ? word : _mm512_srli_epi32(word, 2 * kStep);
          const __m512i index = _mm512_ternarylogic_epi32(low, high[v.kValue], _mm512_set1_epi8(kPair ? 3 : 12), 0xe4);
          decoded[v.kValue] = _mm512_permutexvar_epi8(index, entries);
        });
        use(Constant<kGroup>(), decoded);
      });
    });
  });
}

// The code words and tables of the blocks of a tile, of which `count` outputs exist (kTail), and the words to fetch meanwhile, to the first- and
// to the second-level cache; null: none.
struct TileCodes {
  const uint32_t* codes;
  const uint8_t* table;
  int64_t blocks, row_stride, count;
  const uint32_t *later, *far;
};

template <auto kCache, int kVectors>
CLAQ_INLINE void fetch_vectors(const uint32_t* words) {
  unrolled<kVectors>([&](auto v) CLAQ_STEP { _mm_prefetch(reinterpret_cast<const char*>(words + 16 * v.kValue), kCache); });
}

// All kRows rows of a packed tile; `first`: the sums begin here.
template <int kWidth, int kRows, int kVectors, bool kTail>
void add_tile(const TileCodes& tile, const PackedPlace& place, bool first, float* sums, int64_t stride) {
  const auto for_sums = [&](const auto& use) CLAQ_STEP {
    unrolled<kRows>([&](auto m) CLAQ_STEP {
      unrolled<kVectors>([&](auto v) CLAQ_STEP { use(m, v, sums + m.kValue * stride + 16 * v.kValue); });
    });
  };
  __m512 total[kRows][kVectors];
  for_sums([&](auto m, auto v, const float* sum) CLAQ_STEP {
    total[m.kValue][v.kValue] = first ? _mm512_setzero_ps() : _mm512_loadu_ps(sum);
  });
  const uint32_t *codes = tile.codes, *later = tile.later, *far = tile.far;
  const uint8_t* table = tile.table;
  const int8_t* x = place.quantized;
  const float* scale = place.scale;
  const int32_t* correction = place.correction;
  const int64_t row_stride = tile.row_stride;
  for (int64_t b = 0; b < tile.blocks; ++b) {
    WordsInMemory<kTail> words[kVectors];
    unrolled<kVectors>([&](auto v) CLAQ_STEP {
      words[v.kValue] = {codes + 16 * v.kValue, row_stride, kTail ? first_lanes(tile.count - 16 * v.kValue) : __mmask16{0xffff}};
    });
    __m512i dot[kRows][kVectors];
    for_sums([&](auto m, auto v, const float*) CLAQ_STEP { dot[m.kValue][v.kValue] = Vnni::begin(correction[m.kValue]); });
    const auto fetch_row = [&](auto i) CLAQ_STEP {
      if (i.kValue >= kWidth) return;
      const int64_t row = (b * kWidth + i.kValue) * row_stride;
      if (far) fetch_vectors<_MM_HINT_T1, kVectors>(far + row);
      if (later) fetch_vectors<_MM_HINT_T0, kVectors>(later + row);
    };
    for_groups<kWidth, kVectors>(words, table, fetch_row, [&](auto group, const auto& weights) CLAQ_STEP {
      unrolled<kRows>([&](auto m) CLAQ_STEP {
        const __m512i four = Vnni::activation(x + 4 * (group.kValue * kRows + m.kValue));
        unrolled<kVectors>([&](auto v) CLAQ_STEP {
          dot[m.kValue][v.kValue] = Vnni::dot(dot[m.kValue][v.kValue], weights[v.kValue], four);
        });
      });
    });
    unrolled<kRows>([&](auto m) CLAQ_STEP {
      const __m512 factor = _mm512_set1_ps(scale[m.kValue]);
      unrolled<kVectors>([&](auto v) CLAQ_STEP {
        total[m.kValue][v.kValue] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot[m.kValue][v.kValue]), factor, total[m.kValue][v.kValue]);
      });
    });
    codes += kWidth * row_stride;
    table += kBlock << kWidth;
    x += kBlock * kRows;
    scale += kRows;
    correction += kRows;
  }
  for_sums([&](auto m, auto v, float* sum) CLAQ_STEP { _mm512_storeu_ps(sum, total[m.kValue][v.kValue]); });
}

// Rows [m0, m1), from block `block` on.
template <int kWidth, int kVectors, bool kTail>
void add_rows(const LayerView& layer, const Activations& activations, int64_t m0, int64_t m1, int64_t block, TileCodes tile, float* sums,
              int64_t stride) {
  for (int64_t m = m0; m < m1; m += kPackedRows) {
    PackedPlace place = packed_place(layer, activations, m);
    place.quantized += block * kBlock * place.rows;
    place.scale += block * place.rows;
    place.correction += block * place.rows;
    for_tail<kPackedRows>(place.rows, [&](auto rows) {
      add_tile<kWidth, decltype(rows)::kValue, kVectors, kTail>(tile, place, block == 0, sums + (m - m0) * stride, stride);
    });
    tile.later = tile.far = nullptr;
  }
}

inline bool in_zen_tiles(const LayerView& layer, int64_t rows) {
  int64_t most = kZenMostTileRows;
  for (int s = 0; s < layer.segment_count; ++s) {
    if (layer.segments[s].width == 3) most = kZenMostThirdBitTileRows;
  }
  return rows <= most;
}

inline void zen_tile_sums(const LayerView& layer, const Activations& activations, int64_t m0, int64_t m1, int64_t n0, int64_t n1,
                          float* sums, int64_t stride) {
  for_segments(layer, [&](const Segment& segment, auto width) CLAQ_STEP {
    constexpr int kWidth = decltype(width)::kValue;
    constexpr int64_t kTile = 16 * kZenTileVectors;
    const int64_t row_stride = layer.out_features, whole = n0 + (n1 - n0) / kTile * kTile;
    for (int64_t b = 0; b < segment.blocks; b += kZenTileBlocks) {
      const int64_t left = segment.blocks - b, blocks = left < kZenTileBlocks ? left : kZenTileBlocks;
      const uint32_t* codes = layer.codes + (segment.first_row + b * kWidth) * row_stride;
      const uint8_t* table = layer.table + segment.table_offset + ((b * kBlock) << kWidth);
      // Behind the last tiles come the first ones of the blocks below.
      const uint32_t* below = left >= 2 * kZenTileBlocks ? codes + kZenTileBlocks * kWidth * row_stride : nullptr;
      const auto tiles_ahead = [&](int64_t n, int64_t tiles) -> const uint32_t* {
        const int64_t ahead = n + tiles * kTile, beyond = ahead - whole;
        return beyond < 0 ? codes + ahead : below && beyond < whole - n0 ? below + n0 + beyond : nullptr;
      };
      for (int64_t n = n0; n < whole; n += kTile) {
        const uint32_t* later = tiles_ahead(n, kZenTilesAhead);
        const uint32_t* far = layer.fetch_ahead ? tiles_ahead(n, kZenFarTilesAhead) : nullptr;
        add_rows<kWidth, kZenTileVectors, false>(layer, activations, m0, m1, segment.first_block + b,
                                                 {codes + n, table, blocks, row_stride, kTile, later, far}, sums + n - n0, stride);
      }
      for (int64_t n = whole; n < n1; n += 16) {
        add_rows<kWidth, 1, true>(layer, activations, m0, m1, segment.first_block + b,
                                  {codes + n, table, blocks, row_stride, n1 - n, nullptr, nullptr}, sums + n - n0, stride);
      }
    }
  });
}

}  // namespace
}  // namespace claq
