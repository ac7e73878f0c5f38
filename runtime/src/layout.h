// Geometry of the format and the plain structures that kernels work on; no code here may need a C++ library, because
// kernels are compiled for CPUs that the rest of the library does not assume.
#pragma once

#include <cstddef>
#include <cstdint>

#include "tuning.h"

namespace claq {

constexpr int kBlock = 32;          // stored columns that share an activation scale and whole rows of code words
constexpr int kGroupsPerBlock = 8;  // a group is four columns: what one integer dot-product instruction consumes

// A block whose largest magnitude is below this (and not zero) has no normal reciprocal: its row is done in float32.
constexpr float kSmallestMagnitude = 1e-30f;

// Outliers of an output row are summed in this many interleaved partial sums, then by halves: entry i goes to sum i % 8.
constexpr int kOutlierLanes = 8;

// Tasks get whole multiples of the first (a multiple of every vector length times a register tile), and a family is asked
// for at most the second number of output rows at a time.
constexpr int64_t kNarrowestTile = 96;
constexpr int64_t kLongestTile = 96 * 120;

// Outliers as the families of AVX2 and AVX-512 take them (outlier_slices.cpp). Outputs are put in order of how many they have, a tile of kNarrowestTile
// at a time, and sixteen neighbours in that order are a slice: entry j of its slot s is at first + 16 * j + s, and up to the longest all
// have entries, the rest of value 0.
constexpr int kSliceOutputs = 16;

struct OutlierSlice {
  int64_t first;
  int64_t steps;  // of the longest; kAsRows: its outputs have too different numbers, and are read where the format has them
};
constexpr int64_t kAsRows = -1;

struct OutlierSlices {
  const OutlierSlice* slices;
  const int32_t* count;   // [slots] entries of each slot
  const uint8_t* output;  // [slots] the output of each slot, in its tile
  const uint8_t* slot;    // [slots] the slot of each output, in its tile
  const void* index;      // of LayerView::outlier_index's type
  const uint16_t* value;
};

// A code word holds interleaved columns: shifting it right by `width` times the group's number and masking leaves, in its
// four bytes, the codes of four columns that are not neighbours. Tables and activations are therefore kept in that order,
// which costs nothing at run time. Position 4 * group + byte holds the column given here.
constexpr int column_of_position(int width, int position) {
  const int group = position / 4;
  const int byte = position % 4;
  return width == 4 ? 8 * (group / 2) + 2 * byte + group % 2 : 16 * (group / 4) + 4 * byte + group % 4;
}

// A range of input features or of blocks.
struct Range {
  int64_t begin, end;
};

// One bit-width's run of blocks.
struct Segment {
  int width;
  int64_t first_block;
  int64_t blocks;
  int64_t first_row;      // in codes
  int64_t table_offset;   // in bytes, in LayerView::table
};

struct LayerView {
  int64_t in_features;
  int64_t out_features;
  int64_t columns;  // stored columns P, a multiple of kBlock
  int64_t blocks;
  Segment segments[3];
  int segment_count;
  const uint32_t* codes;
  // Centroids + 128 as unsigned bytes: per block, per group of four columns, per column, 2^width entries.
  const uint8_t* table;
  const float* scale;      // [columns]
  const float* row_scale;  // [out_features]
  const int32_t* gather;   // [columns] input feature of each stored column, -1 for padding
  bool identity_order;     // stored column p is feature first_feature + p where there is one
  int64_t first_feature;   // see identity_order; 0 but for a part of a layer (run_row.cpp)
  const int32_t* outlier_ptr;  // null: no outliers
  const void* outlier_index;
  bool wide_outlier_index;  // int32, else uint16
  const uint16_t* outlier_value;
  const OutlierSlices* outlier_slices;  // null: no outliers, or the family does without
  Tuning tuning;
  const float* bias;  // null: none
  bool lowest_centroid;  // some centroid is -128, which has no negative in a byte
  bool fetch_ahead;      // the codes are not in a cache; see run.cpp
  bool core_cached;      // the codes are in a cache that a core has for itself
};

// The features that prepare_tile needs for blocks [first_block, last_block).
static inline Range features_of(const LayerView& layer, int64_t first_block, int64_t last_block) {
  if (!layer.identity_order) return {0, layer.in_features};
  const int64_t end = last_block * kBlock;
  return {first_block * kBlock, end < layer.in_features ? end : layer.in_features};
}

static inline Range overlap(const Segment& segment, int64_t first_block, int64_t last_block) {
  const int64_t end = segment.first_block + segment.blocks;
  return {segment.first_block > first_block ? segment.first_block : first_block, end < last_block ? end : last_block};
}

// A chunk of rows of x, gathered into stored order and scaled, and for int8 arithmetic quantized a block at a time.
// Parts that a run does not need are null.
//
// What int8 arithmetic reads is packed as PackedPlace says unless the family has an order of its own (avx2_common.h): rows are
// taken eight at a time (the last tile has the rest), and where a kernel needs the same group or block of the rows of a tile,
// they are neighbours.
struct Activations {
  int64_t rows;
  bool alone;                 // the run has one row
  int64_t stride;             // elements between rows of `scaled`
  float* scaled;              // scale[p] * x[order[p]]
  float* transposed;          // `scaled` as [rows / line_rows][columns][line_rows], rows past the last are 0; for outliers
  int64_t line_rows;          // the family's tile_rows; if all rows of a run fit into 8 or 4 and prepare_tile makes them, that
  int8_t* quantized;          // [tile][block][group][row of the tile][4], positions within a block as column_of_position says
  float* block_scale;         // [tile][block][row of the tile], maximum magnitude of the block / 127
  int32_t* block_correction;  // the same, -128 * sum of the block's quantized values: undoes the table's offset
};

constexpr int64_t kPackedRows = 8;
constexpr int64_t kMostTileRows = 16;  // of Family::tile_rows

// Where the int8 parts of a row or tile begin; `rows` is the number of rows of its tile.
struct PackedPlace {
  int64_t rows;
  int8_t* quantized;    // group g of block b: + (b * kGroupsPerBlock + g) * 4 * rows
  float* scale;         // block b: + b * rows
  int32_t* correction;  // likewise
};

static inline PackedPlace packed_place(const LayerView& layer, const Activations& activations, int64_t row) {
  const int64_t first = row / kPackedRows * kPackedRows, lane = row - first, left = activations.rows - first;
  return {left < kPackedRows ? left : kPackedRows, activations.quantized + first * layer.columns + 4 * lane,
          activations.block_scale + first * layer.blocks + lane, activations.block_correction + first * layer.blocks + lane};
}

}  // namespace claq
