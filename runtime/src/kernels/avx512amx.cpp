// AVX-512 with VBMI and VNNI, and AMX for more rows: seven and eight of them are streamed (amx_stream.h); for more a panel of decoded
// centroids is a sequence of tiles of AMX as it lies, one for each block and sixteen outputs, and is multiplied by tiles of sixteen rows of
// x and a block. What a product of two tiles comes to goes through memory to be converted, scaled and added in float32, block by block, as
// in the other families.
#include "amx_stream.h"
#include "amx_tiles.h"
#include "avx512_float.h"
#include "avx512_outliers.h"
#include "avx512_prepare.h"
#include "avx512_vbmi.h"
#include "plain_loops.h"

namespace claq {
namespace {

constexpr int kTileRows = kRowsAtOnce;

// A tile of rows takes about as long as eleven rows take with VNNI, two as long as twenty, however many of their rows there are.
inline bool uses_tiles(int64_t rows) { return rows > kTileRows ? rows >= 21 : rows >= 12; }

// With fewer rows VNNI takes as long, or less.
constexpr int64_t kFewestStreamedRows = 7;

// Rows of x are packed as [rows / 16][block][16][kBlock], scales as [rows / 16][block][16], all sixteen rows always; see PackedBySixteen.
constexpr int64_t kActivationTile = kTileRows * kBlock;

// The tile registers; two of each, as one product begins while the one before is stored.
constexpr int kRowsTile = 0, kWeightsTile = 2, kSumsTile = 4;
constexpr TileShape kShapes[8] = {{kTileRows, kBlock}, {kTileRows, kBlock}, {kGroupsPerBlock, 64}, {kGroupsPerBlock, 64},
                                  {kTileRows, 64},     {kTileRows, 64},     {0, 0},                {0, 0}};

struct Signed : Vnni {
  static constexpr int kShallowRows = 2 * kRowsAtOnce, kShallowBlocks = 6;

  // Centroids as they are, without the 128 that VNNI wants.
  template <int kWidth>
  static __m512i load_table(const uint8_t* table, int group) {
    return _mm512_xor_si512(Vnni::load_table<kWidth>(table, group), _mm512_set1_epi8(-128));
  }
};

// A tile of rows of x and one of sixteen outputs, over the blocks of a panel.
struct TilePair {
  const int8_t* x;
  const float* scale;
  const uint8_t* weights;
  float* sums;  // of row i: + i * stride
};

template <int kParity>
CLAQ_INLINE void begin_product(const TilePair& pair, int64_t block) {
  load_tile<kRowsTile + kParity>(pair.x + block * kActivationTile, kBlock);
  load_tile<kWeightsTile + kParity>(pair.weights + block * kPanelBlock<Signed>, 64 * Signed::kTileVectors);
  zero_tile<kSumsTile + kParity>();
  add_signed_products<kSumsTile + kParity, kRowsTile + kParity, kWeightsTile + kParity>();
}

// The sums of a pair, in registers.
struct Totals {
  __m512 row[kTileRows];

  // Of a pair's first blocks from 0 on, which nothing was written for.
  CLAQ_INLINE void begin(const TilePair& pair, int64_t stride, bool first) {
    if (first) unrolled<kTileRows>([&](auto i) CLAQ_STEP { row[i.kValue] = _mm512_setzero_ps(); });
    else unrolled<kTileRows>([&](auto i) CLAQ_STEP { row[i.kValue] = _mm512_loadu_ps(pair.sums + i.kValue * stride); });
  }
  CLAQ_INLINE void store(const TilePair& pair, int64_t stride) const {
    unrolled<kTileRows>([&](auto i) CLAQ_STEP { _mm512_storeu_ps(pair.sums + i.kValue * stride, row[i.kValue]); });
  }
  CLAQ_INLINE void add(const int32_t* product, const float* scale) {
    unrolled<kTileRows>([&](auto i) CLAQ_STEP {
      const __m512 value = _mm512_cvtepi32_ps(_mm512_load_si512(product + 16 * i.kValue));
      row[i.kValue] = _mm512_fmadd_ps(value, _mm512_set1_ps(scale[i.kValue]), row[i.kValue]);
    });
  }
};

// Adds to the sums of `count` pairs, next() one after the other, of at least kConverted blocks, or begins them: the products of a pair are
// begun while the last ones of the pair before are stored and converted.
template <class Next>
CLAQ_INLINE void multiply_pairs(int64_t count, int64_t blocks, int64_t stride, bool first, const Next& next) {
  // Not one object with the totals: what a tile is stored to counts as memory that any assembly may read.
  alignas(64) int32_t products[kProducts][kTileRows * 16];
  Totals totals;
  int64_t begun = 0;
  const auto begin = [&](const TilePair& pair, int64_t b) CLAQ_STEP {
    int32_t* before = products[(begun + kProducts - 1) % kProducts];
    if (begun % 2) {
      begin_product<1>(pair, b);
      store_tile<kSumsTile>(before, 64);
    } else {
      begin_product<0>(pair, b);
      if (begun > 0) store_tile<kSumsTile + 1>(before, 64);
    }
    ++begun;
  };
  const auto convert = [&](const TilePair& pair, int64_t b) CLAQ_STEP {
    totals.add(products[(begun - 1 - kConverted) % kProducts], pair.scale + b * kTileRows);
  };
  TilePair pair = next();
  for (int64_t b = 0; b < kConverted; ++b) begin(pair, b);
  for (;;) {
    totals.begin(pair, stride, first);
    for (int64_t b = kConverted; b < blocks; ++b) {
      begin(pair, b);
      convert(pair, b - kConverted);
    }
    if (--count == 0) break;
    const TilePair following = next();
    for (int64_t b = 0; b < kConverted; ++b) {
      begin(following, b);
      convert(pair, blocks - kConverted + b);
    }
    totals.store(pair, stride);
    pair = following;
  }
  int32_t* before = products[(begun - 1) % kProducts];
  if (begun % 2) store_tile<kSumsTile>(before, 64);
  else store_tile<kSumsTile + 1>(before, 64);
  for (int64_t b = blocks - kConverted; b < blocks; ++b) {
    ++begun;
    convert(pair, b);
  }
  totals.store(pair, stride);
}

// The same for fewer blocks.
template <class Next>
CLAQ_INLINE void multiply_short_pairs(int64_t count, int64_t blocks, int64_t stride, bool first, const Next& next) {
  alignas(64) int32_t product[kTileRows * 16];
  for (; count > 0; --count) {
    const TilePair pair = next();
    Totals totals;
    totals.begin(pair, stride, first);
    for (int64_t b = 0; b < blocks; ++b) {
      begin_product<0>(pair, b);
      store_tile<kSumsTile>(product, 64);
      totals.add(product, pair.scale + b * kTileRows);
    }
    totals.store(pair, stride);
  }
}

// The tile at output n of a panel by all rows, rounded up to whole tiles: those that are not there are zeros with a scale of 0. Inlined:
// `later` would be stored by its fields and loaded as a vector, which waits for all stores before.
CLAQ_INLINE void multiply_panel_tile_by_tiles(const LayerView& layer, const Activations& activations, int64_t m0, int64_t m1,
                                              const PanelPlace& place, int64_t n, const uint8_t* part, float* sums, int64_t stride,
                                              CodeFetcher<Signed> later) {
  const int64_t outputs = (place.n1 - n + 15) / 16, vectors = outputs < Signed::kTileVectors ? outputs : Signed::kTileVectors;
  const int64_t count = (m1 - m0 + kTileRows - 1) / kTileRows * vectors, fetched = (later.rows() + count - 1) / count;
  const int8_t* x = activations.quantized + m0 * layer.columns + place.first_block * kActivationTile;
  const float* scale = activations.block_scale + m0 * layer.blocks + place.first_block * kTileRows;
  int64_t v = 0;
  const auto next = [&]() CLAQ_STEP {
    later.fetch(fetched);
    const TilePair pair{x, scale, part + 64 * v, sums + 16 * v};
    if (++v == vectors) {
      v = 0;
      x += kTileRows * layer.columns;
      scale += kTileRows * layer.blocks;
      sums += kTileRows * stride;
    }
    return pair;
  };
  const bool first = place.first_block == 0;
  if (place.blocks >= kConverted) multiply_pairs(count, place.blocks, stride, first, next);
  else multiply_short_pairs(count, place.blocks, stride, first, next);
}

// Shallow panels for a few rows, else deep ones. Functions of their own: inlined into the one below, they made GCC arrange the loops for a
// row alone so that these took 12 to 16 % longer.
template <bool kShallow>
__attribute__((noinline)) void panel_sums_by_tiles(const LayerView& layer, const Activations& activations, int64_t m0, int64_t m1,
                                                   int64_t n0, int64_t n1, float* sums, int64_t stride, void* scratch) {
  configure_tiles(kShapes);
  auto* panel = static_cast<uint8_t*>(scratch);
  const auto multiply = [&](const PanelPlace& place, int64_t n, const uint8_t* part, float* to, const CodeFetcher<Signed>& later) CLAQ_STEP {
    multiply_panel_tile_by_tiles(layer, activations, m0, m1, place, n, part, to, stride, later);
  };
  if constexpr (kShallow) shallow_panels<Signed>(layer, n0, n1, sums, panel, multiply);
  else deep_panels<Signed>(layer, m1 - m0, n0, n1, sums, panel, multiply);
  release_tiles();
}

void sums_int8_by_tiles(const LayerView& layer, const Activations& activations, int64_t m0, int64_t m1, int64_t n0, int64_t n1, float* sums,
                        int64_t stride, void* scratch) {
  if (uses_tiles(activations.rows)) {
    const auto by_tiles = m1 - m0 <= Signed::kShallowRows ? panel_sums_by_tiles<true> : panel_sums_by_tiles<false>;
    return by_tiles(layer, activations, m0, m1, n0, n1, sums, stride, scratch);
  }
  const PackedPlace place = packed_place(layer, activations, m0);
  if (m1 - m0 != place.rows || place.rows < kFewestStreamedRows) {
    return sums_int8<Vnni>(layer, activations, m0, m1, n0, n1, sums, stride, scratch);
  }
  const auto stream = place.rows == 7 ? stream_by_tiles<Signed, 7> : stream_by_tiles<Signed, 8>;
  clear_sums(m1 - m0, n1 - n0, sums, stride);
  stream(layer, place, n0, n1, sums, stride);
}

void prepare_tile_of_tiles(const LayerView& layer, const float* const* x, Activations& activations, int64_t first, int64_t first_block,
                           int64_t last_block, float* features, uint8_t* exact) {
  const auto prepare = uses_tiles(activations.rows) ? prepare_lines<PackedBySixteen> : prepare_tile;
  prepare(layer, x, activations, first, first_block, last_block, features, exact);
}

bool supported() { return has_vbmi_and_vnni() && tiles_supported(); }

}  // namespace

const Family kAvx512Amx = {"avx512amx", supported, {60e9, 200e9}, {60e9, 60e9}, kRowsAtOnce, 1, true, false, kWideFloatSums, prepare_row,
                           prepare_tile_of_tiles, transpose, sums_int8_by_tiles, sums_float, add_outliers, finish_row, half_row_to_float,
                           float_row_to_half, swiglu, add_parts};

}  // namespace claq
