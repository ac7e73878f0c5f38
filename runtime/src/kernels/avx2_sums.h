// int8 and float32 sums of the AVX2 families.
//
// A row of x alone in int8: codes are read once, in order, and never leave the registers (stream). All else goes through
// panels: the centroids of a stripe of outputs and a few blocks are decoded into the first-level cache, in the form that the
// inner step takes, and multiplied by every row of x in register tiles.
#pragma once

#include "avx2_decode.h"

namespace claq {
namespace {

constexpr int kBlocksAhead = 4;  // how far ahead code words are fetched while a panel is decoded

inline void fetch_words(const uint32_t* codes, int64_t rows, int64_t row_stride) {
  for (int64_t i = 0; i < rows; ++i) {
    _mm_prefetch(reinterpret_cast<const char*>(codes + i * row_stride), _MM_HINT_T0);
    _mm_prefetch(reinterpret_cast<const char*>(codes + i * row_stride + 16), _MM_HINT_T0);
  }
}

// Fetches the entries of a block's tables, which the hardware does not foresee: other reads come between those of two blocks.
inline void fetch_table(const uint8_t* table, int width) {
  for (int64_t i = 0; i < int64_t{kBlock} << width; i += 64) _mm_prefetch(reinterpret_cast<const char*>(table + i), _MM_HINT_T0);
}

// Fetches the code words of a row alone, whose steps of kDecodedOutputs outputs go over [n0, n1) block after block, ahead of the
// step that is decoded: far enough for memory, and few enough lines to stay in the first-level cache.
class StreamFetcher {
 public:
  StreamFetcher(const LayerView& layer, int64_t n0, int64_t n1)
      : in_order_(n1 - n0 == layer.out_features && n1 - n0 <= kFewOutputs),
        wanted_(in_order_ || layer.fetch_ahead),
        row_stride_(layer.out_features),
        outputs_((n1 - n0 + kDecodedOutputs - 1) / kDecodedOutputs * kDecodedOutputs),
        blocks_(kStepsAhead * kDecodedOutputs / outputs_),
        rest_(kStepsAhead * kDecodedOutputs % outputs_),
        wrap_from_(n0 + outputs_ - rest_),
        // The first step of a block of 4 bits reads at three quarters of it.
        bytes_ahead_(12 * outputs_ < kMostBytesAhead ? 12 * outputs_ : kMostBytesAhead) {
    if (!wanted_ || layer.blocks == 0) return;
    const Segment& segment = layer.segments[0];
    if (in_order_) {
      fetch_bytes(block_codes(layer, segment, 0), 0, bytes_ahead_);
      return;
    }
    for (int64_t step = 0; step < kStepsAhead; ++step) {
      const int64_t block = step * kDecodedOutputs / outputs_, n = n0 + step * kDecodedOutputs % outputs_;
      if (block < segment.blocks) fetch_words(block_codes(layer, segment, block) + n, segment.width, row_stride_);
    }
  }

  // Called at output n of a block, whose code words are at `codes`. (In the last blocks before another width it is off by some.)
  template <int kWidth>
  CLAQ_INLINE void at(const uint32_t* codes, int64_t n) const {
    if (!wanted_) return;
    if (in_order_) {
      constexpr int64_t kStepBytes = kWidth * kDecodedOutputs * static_cast<int64_t>(sizeof(uint32_t));
      fetch_bytes(codes, n / kDecodedOutputs * kStepBytes + bytes_ahead_, kStepBytes);
      return;
    }
    const bool wraps = n >= wrap_from_;
    fetch_words(codes + (blocks_ + wraps) * kWidth * row_stride_ + n + rest_ - (wraps ? outputs_ : 0), kWidth, row_stride_);
  }

 private:
  static constexpr int64_t kStepsAhead = 16;
  // All outputs of a block, if they are few, are fetched in the order in which they lie, not in that of the steps, which take a
  // short piece of each of the block's rows of words: so the hardware goes along. Also from a cache: the pieces end before the hardware
  // has learned of them, and it costs nothing where it knows.
  static constexpr int64_t kFewOutputs = 2048;
  static constexpr int64_t kMostBytesAhead = 16 * 1024;

  static CLAQ_INLINE void fetch_bytes(const uint32_t* codes, int64_t from, int64_t count) {
    const char* first = reinterpret_cast<const char*>(codes) + from;
    for (int64_t i = 0; i < count; i += 64) _mm_prefetch(first + i, _MM_HINT_T0);
  }

  bool in_order_, wanted_;
  int64_t row_stride_, outputs_, blocks_, rest_, wrap_from_, bytes_ahead_;
};

// ---- panels

constexpr int kVectors = 2;            // of eight outputs: a tile
constexpr int kTile = 8 * kVectors;
constexpr int64_t kPanelBytes = 16 * 1024;
constexpr int64_t kFewRows = 8;        // so few leave no time to fetch the next panel, code words are fetched while decoding

// Outputs [n0, n1) and blocks [first_block, first_block + blocks): tile after tile, within a tile block after block.
struct PanelPlace {
  int64_t first_block, blocks, n0, n1;
};

// Fetches the code words of a panel, while the one before is multiplied: its rows of words are too short for the hardware to
// see a stream in them.
inline void fetch_panel(const LayerView& layer, const PanelPlace& place) {
  for_each_block(layer, place.first_block, place.blocks, [&](const Segment& segment, int64_t block) {
    const uint32_t* codes = block_codes(layer, segment, block);
    for (int i = 0; i < segment.width; ++i) {
      for (int64_t n = place.n0; n < place.n1; n += 16) {
        _mm_prefetch(reinterpret_cast<const char*>(codes + i * layer.out_features + n), _MM_HINT_T0);
      }
    }
  });
}

// Calls body(place, the next one) for panels of at most `parts` tiles times blocks, which together cover the outputs and all
// blocks. All outputs of some blocks come before the next blocks: activations stay in the cache.
template <class Body>
CLAQ_INLINE void for_each_panel(const LayerView& layer, int64_t rows, int64_t n0, int64_t n1, int64_t parts, int64_t sums, const Body& body) {
  // Few rows: wide and shallow, because decoding dominates and wants long runs of code words. Many: narrow and deep, so that
  // sums are seldom loaded and stored. Tiles are decoded in pairs.
  int64_t tiles = sums / rows / kTile / 2 * 2;
  tiles = tiles < 2 ? 2 : tiles > parts ? parts : tiles;
  const int64_t depth = parts / tiles, width = tiles * kTile;
  const auto place = [&](int64_t first, int64_t n) {
    const int64_t left = layer.blocks - first;
    return PanelPlace{first, left < depth ? left : depth, n, n1 - n < width ? n1 : n + width};
  };
  for (int64_t first = 0; first < layer.blocks; first += depth) {
    for (int64_t n = n0; n < n1; n += width) {
      body(place(first, n), n + width < n1 ? place(first, n + width) : place(first + depth, n0));
    }
  }
}

// Decodes the place's centroids; put(Constant<bits>, block of the place, tile of the place, group, vector of the tile, bytes).
template <class Change, class Put>
CLAQ_INLINE void decode_panel(const LayerView& layer, const PanelPlace& place, bool fetch, const Change& change, const Put& put) {
  for_each_block(layer, place.first_block, place.blocks, [&](const Segment& segment, int64_t block) {
    const uint32_t* codes = block_codes(layer, segment, block);
    const uint8_t* table = block_table(layer, segment, block);
    const int64_t row_stride = layer.out_features, b = block - place.first_block;
    with_width(segment.width, [&](auto width) {
      constexpr int kWidth = decltype(width)::kValue;
      BlockTables tables;
      make_tables<kWidth>(table, change, tables);
      for (int64_t n = place.n0; n < place.n1; n += kDecodedOutputs) {
        if (fetch) fetch_words(codes + kBlocksAhead * kWidth * row_stride + n, kWidth, row_stride);
        const int64_t tile = (n - place.n0) / kTile, left = place.n1 - n;
        const auto put_here = [&](int group, int v, __m256i bytes) { put(width, b, tile + v / kVectors, group, v % kVectors, bytes); };
        if (left >= kDecodedOutputs) decode<kWidth, false>(tables, codes + n, row_stride, left, put_here);
        else decode<kWidth, true>(tables, codes + n, row_stride, left, put_here);
      }
    });
  });
}

// Calls tile(Constant<rows>, first row) for rows [m0, m1), at most kMost at a time.
template <int kMost, class Tile>
CLAQ_INLINE void for_row_tiles(int64_t m0, int64_t m1, const Tile& tile) {
  int64_t m = m0;
  for (; m + kMost <= m1; m += kMost) tile(Constant<kMost>{}, m);
  if constexpr (kMost > 1) for_row_tiles<kMost - 1>(m, m1, tile);
}

// ---- int8

constexpr int64_t kInt8PanelSums = 2 * 1024;  // sums that a panel may work on

// `dot` takes panels, whose centroids are offset to unsigned: a sum begins with the correction. `row_dot` is for a row alone,
// with tables as row_table makes them from the layer's and lanes as row_lanes from the packed ones.
#if defined(__AVXVNNI__)
CLAQ_INLINE __m256i dot(__m256i sum, __m256i w, __m256i x) { return _mm256_dpbusd_avx_epi32(sum, w, x); }

inline bool streams(const LayerView&) { return true; }
CLAQ_INLINE __m256i row_begin(int32_t correction) { return _mm256_set1_epi32(correction); }
CLAQ_INLINE __m256i row_dot(__m256i sum, __m256i w, __m256i x) { return _mm256_dpbusd_avx_epi32(sum, w, x); }
CLAQ_INLINE __m256i row_positions(const int32_t* lanes) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(lanes)); }
CLAQ_INLINE __m256i row_factors(__m256i positions) { return positions; }
CLAQ_INLINE __m128i row_entries(__m128i entries, __m128i) { return entries; }
#else
CLAQ_INLINE __m256i dot(__m256i sum, __m256i w, __m256i x) {
  sum = _mm256_add_epi32(sum, _mm256_madd_epi16(w, x));
  // Compilers would add the products of many steps in pairs, for which there are not enough registers.
  asm("" : "+x"(sum));
  return sum;
}

// A row alone has one activation for each table, whose sign goes into the table: magnitudes times signed bytes do not saturate
// the 16 bits, |2 * 127 * -128| < 2^15. A centroid of -128 has no negative and takes the panels.
inline bool streams(const LayerView& layer) { return !layer.lowest_centroid; }
CLAQ_INLINE __m256i row_begin(int32_t) { return _mm256_setzero_si256(); }
CLAQ_INLINE __m256i row_dot(__m256i sum, __m256i w, __m256i x) {
  sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(x, w), _mm256_set1_epi16(1)));
  asm("" : "+x"(sum));  // as in `dot`
  return sum;
}
// The 32 activations as bytes, by position.
CLAQ_INLINE __m256i row_positions(const int32_t* lanes) {
  const auto* from = reinterpret_cast<const __m256i*>(lanes);
  const __m256i packed = _mm256_packs_epi16(_mm256_loadu_si256(from), _mm256_loadu_si256(from + 1));
  const __m256i in_order = _mm256_permute4x64_epi64(packed, 0xd8);
  return _mm256_shuffle_epi8(in_order,
                             _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15)));
}
CLAQ_INLINE __m256i row_factors(__m256i positions) { return _mm256_abs_epi8(positions); }
// `signs` has, for each entry, the activation of its position.
CLAQ_INLINE __m128i row_entries(__m128i entries, __m128i signs) {
  return _mm_sign_epi8(_mm_xor_si128(entries, _mm_set1_epi8(-128)), signs);
}
#endif

// Sixteen bytes: the activation of the position of each entry, the first being `position`.
template <int kWidth>
CLAQ_INLINE __m128i row_signs(const int8_t* positions, int position) {
  if constexpr (kWidth == 4) return _mm_set1_epi8(positions[position]);
  const __m128i four = _mm_cvtsi32_si128(*reinterpret_cast<const int32_t*>(positions + position / 4 * 4));
  if constexpr (kWidth == 2) return _mm_shuffle_epi8(four, _mm_setr_epi8(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3));
  const __m128i two = position % 4 ? _mm_srli_epi32(four, 16) : four;
  return _mm_shuffle_epi8(two, _mm_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1));
}

template <int kWidth, bool kTail>
CLAQ_INLINE void stream_step(const BlockTables& tables, const uint32_t* codes, int64_t row_stride, int64_t left,
                             const int32_t* factors, int32_t correction, __m256 scale, float* sums) {
  __m256i acc[kDecodedVectors];
#pragma GCC unroll 4
  for (auto& sum : acc) sum = row_begin(correction);
  decode<kWidth, kTail>(tables, codes, row_stride, left, [&](int group, int v, __m256i bytes) {
    acc[v] = row_dot(acc[v], bytes, _mm256_set1_epi32(factors[group]));
  });
#pragma GCC unroll 4
  for (int v = 0; v < kDecodedVectors; ++v) {
    float* sum = sums + 8 * v;
    _mm256_storeu_ps(sum, _mm256_fmadd_ps(_mm256_cvtepi32_ps(acc[v]), scale, _mm256_loadu_ps(sum)));
  }
}

inline void stream(const LayerView& layer, const PackedRow& row, int64_t n0, int64_t n1, float* sums) {
  const StreamFetcher fetcher(layer, n0, n1);
  for_each_block(layer, 0, layer.blocks, [&](const Segment& segment, int64_t block) {
    alignas(32) int8_t positions[kBlock];
    alignas(32) int32_t factors[kGroupsPerBlock];
    const __m256i activations = row_positions(row.lanes + block * kSteps);
    _mm256_store_si256(reinterpret_cast<__m256i*>(positions), activations);
    _mm256_store_si256(reinterpret_cast<__m256i*>(factors), row_factors(activations));
    const uint32_t* codes = block_codes(layer, segment, block);
    const uint8_t* table = block_table(layer, segment, block);
    if (layer.fetch_ahead) fetch_table(table + (kBlock << segment.width), segment.width);
    const int64_t row_stride = layer.out_features;
    const __m256 scale = _mm256_set1_ps(row.scale[block]);
    with_width(segment.width, [&](auto width) {
      constexpr int kWidth = decltype(width)::kValue;
      BlockTables tables;
      make_tables<kWidth>(
          table, [&](__m128i entries, int position) { return row_entries(entries, row_signs<kWidth>(positions, position)); }, tables);
      int64_t n = n0;
      for (; n + kDecodedOutputs <= n1; n += kDecodedOutputs) {
        fetcher.at<kWidth>(codes, n);
        stream_step<kWidth, false>(tables, codes + n, row_stride, kDecodedOutputs, factors, row.correction[block], scale, sums + n - n0);
      }
      if (n < n1) {
        stream_step<kWidth, true>(tables, codes + n, row_stride, n1 - n, factors, row.correction[block], scale, sums + n - n0);
      }
    });
  });
}

// A panel holds centroids in the form that `dot` takes; as bytes, of half the size, if no more than kFewRows rows are multiplied by
// them: then widening them again for each tile of rows costs less than storing and loading twice as much.
template <bool kBytes>
constexpr int64_t kPartBytes = kBytes ? kBlock * kTile : kBlock * kTile * kActivationBytes;

template <bool kBytes>
CLAQ_INLINE void store_weights(uint8_t* part, int group, int vector, __m256i bytes) {
  auto* to = reinterpret_cast<__m256i*>(part + group * (kPartBytes<kBytes> / kGroupsPerBlock)) + vector;
  if constexpr (kBytes || kActivationBytes == 1) {
    _mm256_store_si256(to, bytes);
  } else {
    _mm256_store_si256(to, _mm256_and_si256(bytes, _mm256_set1_epi16(0xff)));
    _mm256_store_si256(to + kVectors, _mm256_srli_epi16(bytes, 8));
  }
}

constexpr int kStepsOfGroup = kSteps / kGroupsPerBlock;

// A group's centroids as `dot` takes them, step by step.
template <bool kBytes>
CLAQ_INLINE void load_weights(const uint8_t* part, int group, __m256i (&w)[kStepsOfGroup][kVectors]) {
  const auto* from = reinterpret_cast<const __m256i*>(part + group * (kPartBytes<kBytes> / kGroupsPerBlock));
#pragma GCC unroll 2
  for (int v = 0; v < kVectors; ++v) {
    if constexpr (kBytes && kStepsOfGroup == 2) {
      const __m256i bytes = _mm256_load_si256(from + v);
      w[0][v] = _mm256_and_si256(bytes, _mm256_set1_epi16(0xff));
      w[1][v] = _mm256_srli_epi16(bytes, 8);
    } else {
#pragma GCC unroll 2
      for (int t = 0; t < kStepsOfGroup; ++t) w[t][v] = _mm256_load_si256(from + t * kVectors + v);
    }
  }
}

// kRows rows of a packed tile of kPacked, and one tile of outputs.
template <int kPacked, int kRows, bool kBytes>
CLAQ_INLINE void multiply_tile(const PackedRow& row, const PanelPlace& place, const uint8_t* panel, float* sums, int64_t stride) {
  const int32_t* x = row.lanes + place.first_block * kSteps * kPacked;
  const float* scale = row.scale + place.first_block * kPacked;
  const int32_t* correction = row.correction + place.first_block * kPacked;
  for (int64_t b = 0; b < place.blocks; ++b) {
    __m256i acc[kRows][kVectors];
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) acc[i][v] = _mm256_set1_epi32(correction[i]);
    }
#pragma GCC unroll 8
    for (int g = 0; g < kGroupsPerBlock; ++g) {
      __m256i w[kStepsOfGroup][kVectors];
      load_weights<kBytes>(panel, g, w);
#pragma GCC unroll 2
      for (int t = 0; t < kStepsOfGroup; ++t) {
#pragma GCC unroll 4
        for (int i = 0; i < kRows; ++i) {
          const __m256i lanes = _mm256_set1_epi32(x[(g * kStepsOfGroup + t) * kPacked + i]);
#pragma GCC unroll 2
          for (int v = 0; v < kVectors; ++v) acc[i][v] = dot(acc[i][v], w[t][v], lanes);
        }
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
      const __m256 factor = _mm256_set1_ps(scale[i]);
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        float* sum = sums + i * stride + 8 * v;
        _mm256_storeu_ps(sum, _mm256_fmadd_ps(_mm256_cvtepi32_ps(acc[i][v]), factor, _mm256_loadu_ps(sum)));
      }
    }
    x += kSteps * kPacked;
    scale += kPacked;
    correction += kPacked;
    panel += kPartBytes<kBytes>;
  }
}

template <bool kFew>
inline void panels(const LayerView& layer, const Activations& activations, int64_t m0, int64_t m1, int64_t n0, int64_t n1, float* sums,
                   int64_t stride, uint8_t* panel) {
  constexpr int64_t kBytes = kPartBytes<kFew>;
  for_each_panel(layer, m1 - m0, n0, n1, kPanelBytes / kBytes, kInt8PanelSums, [&](const PanelPlace& place, const PanelPlace& next) {
    decode_panel(
        layer, place, kFew, [](__m128i entries, int) { return entries; },
        [&](auto, int64_t b, int64_t tile, int group, int vector, __m256i bytes) {
          store_weights<kFew>(panel + (tile * place.blocks + b) * kBytes, group, vector, bytes);
        });
    if (!kFew) fetch_panel(layer, next);
    for_row_tiles<kPackedTileRows>(m0, m1, [&](auto rows, int64_t m) {
      constexpr int kRows = decltype(rows)::kValue;
      const PackedRow row = packed_row(layer, activations, m);
      for (int64_t n = place.n0; n < place.n1; n += kTile) {
        const uint8_t* part = panel + (n - place.n0) / kTile * place.blocks * kBytes;
        float* to = sums + (m - m0) * stride + n - n0;
        if constexpr (kFew && kRows == 1) {
          if (activations.alone) {
            multiply_tile<1, 1, kFew>(row, place, part, to, stride);
            continue;
          }
        }
        multiply_tile<kPackedTileRows, kRows, kFew>(row, place, part, to, stride);
      }
    });
  });
}

// Rows [m0, m1), which begin with a packed tile.
inline void sums_int8(const LayerView& layer, const Activations& activations, int64_t m0, int64_t m1, int64_t n0, int64_t n1,
                      float* sums, int64_t stride, void* scratch) {
  clear_sums(m1 - m0, n1 - n0, sums, stride);
  if (activations.alone && streams(layer)) return stream(layer, packed_row(layer, activations, m0), n0, n1, sums);
  auto* panel = static_cast<uint8_t*>(scratch);
  if (m1 - m0 <= kFewRows) panels<true>(layer, activations, m0, m1, n0, n1, sums, stride, panel);
  else panels<false>(layer, activations, m0, m1, n0, n1, sums, stride, panel);
}

// ---- float32

constexpr int64_t kFloatPartElements = kBlock * kTile;
constexpr int64_t kFloatPanelSums = 1024;
constexpr int kFloatTileRows = 6;

template <int kRows>
CLAQ_INLINE void multiply_float_tile(const float* x, int64_t x_stride, const float* panel, int64_t columns, float* sums, int64_t stride) {
  __m256 acc[kRows][kVectors];
#pragma GCC unroll 6
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) acc[i][v] = _mm256_loadu_ps(sums + i * stride + 8 * v);
  }
  for (int64_t k = 0; k < columns; ++k) {
    __m256 w[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) w[v] = _mm256_load_ps(panel + k * kTile + 8 * v);
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i) {
      const __m256 value = _mm256_broadcast_ss(x + i * x_stride + k);
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) acc[i][v] = _mm256_fmadd_ps(value, w[v], acc[i][v]);
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) _mm256_storeu_ps(sums + i * stride + 8 * v, acc[i][v]);
  }
}

CLAQ_INLINE __m128i signed_entries(__m128i entries, int) { return _mm_xor_si128(entries, _mm_set1_epi8(-128)); }

// The centroids of the four columns of a group, each in eight outputs.
template <int kWidth, class Store>
CLAQ_INLINE void centroids_of_group(int group, __m256i bytes, const Store& store) {
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m256i top = j == 3 ? bytes : _mm256_slli_epi32(bytes, 24 - 8 * j);
    store(column_of_position(kWidth, 4 * group + j), _mm256_cvtepi32_ps(_mm256_srai_epi32(top, 24)));
  }
}

// One row of x: centroids meet it in the registers.
inline void stream_float(const LayerView& layer, const float* x, int64_t n0, int64_t n1, float* sums) {
  const StreamFetcher fetcher(layer, n0, n1);
  for_each_block(layer, 0, layer.blocks, [&](const Segment& segment, int64_t block) {
    const uint32_t* codes = block_codes(layer, segment, block);
    const int64_t row_stride = layer.out_features;
    with_width(segment.width, [&](auto width) {
      constexpr int kWidth = decltype(width)::kValue;
      BlockTables tables;
      make_tables<kWidth>(block_table(layer, segment, block), signed_entries, tables);
      const auto step = [&](int64_t n, auto decode_here) {
        __m256 acc[kDecodedVectors];
#pragma GCC unroll 4
        for (int v = 0; v < kDecodedVectors; ++v) acc[v] = _mm256_loadu_ps(sums + n - n0 + 8 * v);
        decode_here([&](int group, int v, __m256i bytes) {
          centroids_of_group<kWidth>(group, bytes, [&](int column, __m256 centroids) {
            acc[v] = _mm256_fmadd_ps(_mm256_broadcast_ss(x + block * kBlock + column), centroids, acc[v]);
          });
        });
#pragma GCC unroll 4
        for (int v = 0; v < kDecodedVectors; ++v) _mm256_storeu_ps(sums + n - n0 + 8 * v, acc[v]);
      };
      int64_t n = n0;
      for (; n + kDecodedOutputs <= n1; n += kDecodedOutputs) {
        fetcher.at<kWidth>(codes, n);
        step(n, [&](const auto& put) { decode<kWidth, false>(tables, codes + n, row_stride, kDecodedOutputs, put); });
      }
      if (n < n1) step(n, [&](const auto& put) { decode<kWidth, true>(tables, codes + n, row_stride, n1 - n, put); });
    });
  });
}

inline void sums_float(const LayerView& layer, const Activations& activations, int64_t m0, int64_t m1, int64_t n0, int64_t n1,
                       float* sums, int64_t stride, void* scratch) {
  auto* panel = static_cast<float*>(scratch);
  constexpr int64_t kParts = kPanelBytes / (kFloatPartElements * static_cast<int64_t>(sizeof(float)));
  clear_sums(m1 - m0, n1 - n0, sums, stride);
  if (m1 - m0 == 1) return stream_float(layer, activations.scaled + m0 * activations.stride, n0, n1, sums);
  const bool few = m1 - m0 <= kFewRows;
  for_each_panel(layer, m1 - m0, n0, n1, kParts, kFloatPanelSums, [&](const PanelPlace& place, const PanelPlace& next) {
    decode_panel(
        layer, place, few, signed_entries,
        [&](auto width, int64_t b, int64_t tile, int group, int vector, __m256i bytes) {
          float* part = panel + (tile * place.blocks + b) * kFloatPartElements + 8 * vector;
          centroids_of_group<decltype(width)::kValue>(group, bytes, [&](int column, __m256 centroids) {
            _mm256_store_ps(part + column * kTile, centroids);
          });
        });
    if (!few) fetch_panel(layer, next);
    for_row_tiles<kFloatTileRows>(m0, m1, [&](auto rows, int64_t m) {
      const float* x = activations.scaled + m * activations.stride + place.first_block * kBlock;
      for (int64_t n = place.n0; n < place.n1; n += kTile) {
        const float* part = panel + (n - place.n0) / kTile * place.blocks * kFloatPartElements;
        multiply_float_tile<decltype(rows)::kValue>(x, activations.stride, part, place.blocks * kBlock,
                                                    sums + (m - m0) * stride + n - n0, stride);
      }
    });
  });
}

}  // namespace
}  // namespace claq
