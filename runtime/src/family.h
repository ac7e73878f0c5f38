// What a family of kernels offers; one family is chosen for each layer when the layer is made.
#pragma once

#include <cstdint>

#include "layout.h"

namespace claq {

// Rounded speed of a thread, a second, only used to decide into how many tasks to split; see product_seconds.
struct Speed {
  double weights, products;
};

// A task's results that stay in the first-level cache.
constexpr int64_t kCachedSums = 6 * 1024;

struct Family {
  const char* name;
  bool (*supported)();

  Speed int8, float32;

  int64_t tile_rows;         // rows of x that prepare_tile and transpose take at a time
  int64_t activation_bytes;  // of `activations.quantized` for each row and stored column
  bool outlier_slices;       // add_outliers reads LayerView::outlier_slices
  bool short_runs;           // on Zen, a row alone may take its code words in short runs: they are fetched far ahead
  int64_t float_sums;        // of many rows of x: what sums_float is called for at most, at least kCachedSums

  // Fills row `row` of `activations.scaled` (if not null) from x, and if `quantize` is set that of the int8 parts. Returns
  // false if the row needs float32 arithmetic: a value is not finite, or a block too small for a normal scale; such blocks
  // are quantized to zeros.
  bool (*prepare_row)(const LayerView& layer, const float* x, Activations& activations, int64_t row, bool quantize);

  // The same for rows [first, first + tile_rows) of int8 arithmetic, or to the last row if that is nearer, and blocks [first_block,
  // last_block) of the columns (all, unless the layer's order is the identity): fills the int8 parts and `transposed` (if not null).
  // `first` is a multiple of tile_rows, `x` points to each row, and `features` is room for as many lines of tile_rows as in_features
  // rounded up to 16, and one more. `exact[i]` is set to 1 for a row that needs float32 arithmetic because of these blocks, else
  // to 0. Null: the family does without.
  void (*prepare_tile)(const LayerView& layer, const float* const* x, Activations& activations, int64_t first, int64_t first_block,
                       int64_t last_block, float* features, uint8_t* exact);

  // Fills tile `tile` of `activations.transposed` from `scaled`; null: the family does without.
  void (*transpose)(const LayerView& layer, Activations& activations, int64_t tile);

  // sums[m - m0][n - n0] = sum over stored columns of activation * centroid, for output rows [n0, n1), rows [m0, m1).
  // `stride` is that of `sums`, at least n1 - n0 rounded up to kNarrowestTile, and `sums` has room for rows up to the next multiple of
  // kMostTileRows; `scratch` holds kScratchBytes, aligned to 64.
  // For int8, m0 and m1 are multiples of kPackedRows, or m1 is the number of rows.
  void (*sums_int8)(const LayerView& layer, const Activations& activations, int64_t m0, int64_t m1, int64_t n0, int64_t n1,
                    float* sums, int64_t stride, void* scratch);
  void (*sums_float)(const LayerView& layer, const Activations& activations, int64_t m0, int64_t m1, int64_t n0, int64_t n1,
                     float* sums, int64_t stride, void* scratch);

  // Adds the outliers of those output rows to `sums`, from `scaled` if there is no `transposed`. With int8 parts `transposed` may
  // be multiplied by 0 where an output has no outlier: rows that are not finite are then without a meaning.
  void (*add_outliers)(const LayerView& layer, const Activations& activations, int64_t m0, int64_t m1, int64_t n0,
                       int64_t n1, float* sums, int64_t stride);

  // y[n] = row_scale[n] * sums[n] + bias[n] for one row.
  void (*finish_row)(const LayerView& layer, int64_t n0, int64_t n1, const float* sums, float* y);

  // Conversions of contiguous elements for hosts that pass 16-bit activations.
  void (*half_to_float)(const uint16_t* from, float* to, int64_t count);
  void (*float_to_half)(const float* from, uint16_t* to, int64_t count);

  // y[i] = silu(gate[i]) * up[i].
  void (*swiglu)(const float* gate, const float* up, float* y, int64_t count);

  // sums[i] += sums[stride + i], then sums[2 * stride + i], ... of `parts` parts in all; count <= stride.
  void (*add_parts)(float* sums, int64_t stride, int64_t parts, int64_t count);
};

// Roughly what a product of `rows` rows takes one thread, to be given to task_count. Half of it where a core has the code words in its own
// cache: short sessions that wake a thread for these take longer, and what another core is to read has to be fetched from the first.
inline double product_seconds(const Family& family, const LayerView& layer, bool int8, int64_t rows) {
  const Speed& speed = int8 ? family.int8 : family.float32;
  const double weights = static_cast<double>(layer.columns) * static_cast<double>(layer.out_features);
  const double seconds = weights / speed.weights + weights * static_cast<double>(rows) / speed.products;
  return layer.core_cached ? seconds / 2 : seconds;
}

// Bytes of scratch for one call of sums_*; the largest need of any family.
constexpr int64_t kScratchBytes = 256 * 1024;

extern const Family kPortable;
#if defined(__x86_64__)
extern const Family kAvx2;
extern const Family kAvxVnni;
extern const Family kAvx512Bw;
extern const Family kAvx512BwVnni;
extern const Family kAvx512Vnni;
extern const Family kAvx512Amx;
#endif
#if defined(__aarch64__)
extern const Family kNeon;
#endif

// The named family, or for null what CLAQ_KERNEL says, or the best one; throws InvalidArgument for one that is unknown or
// not supported here.
const Family& choose_family(const char* name);

const char* family_names();

// The vectors of loops in plain C++ that are compiled once for each width: those of the family that choose_family gives.
enum class Vectors { kPortable, kAvx2, kAvx512 };
Vectors choose_vectors(const char* name);

}  // namespace claq
