// Quantizes one column: outliers out, codebook fitted, rounded to what is stored, codes (claq_export/algorithm/columns.py).
#pragma once

#include <cstdint>
#include <vector>

#include "kmeans.h"
#include "loops.h"
#include "sort.h"

namespace claq::quantize {

struct Rules {
  Method method;
  int most_iterations;
  bool from_both_sides;  // outliers: half from each end, else the largest magnitudes
  bool fit_outliers;
};

// Where the results of one column go; the parts after `scale` may be null if no weight is reserved.
struct ColumnResult {
  uint8_t* codes;        // [rows]
  float* value;          // [rows]
  int8_t* codebook;      // [kMostCentroids], zero beyond the width's entries
  uint16_t* scale;       // float16
  int64_t* outliers;     // how many are kept: all that were asked for, or none where the scale is zero
  int32_t* outlier_row;  // ascending
  uint16_t* outlier_extra;
};

// Scratch memory for columns of `rows` values; one object serves one thread.
class ColumnQuantizer {
 public:
  // `row_weight` null: all rows count alike. Throws std::bad_alloc.
  ColumnQuantizer(int64_t rows, const double* row_weight, const Rules& rules, const Loops& loops);

  // False if a value of the column is not finite. `reserve` is less than the number of rows.
  bool quantize(const float* column, int width, int64_t reserve, const double* start, const ColumnResult& result);

 private:
  SortedValues inner_values(int64_t low, int64_t high);
  void locate(const float* column, int64_t low, int64_t high, int32_t* found) const;

  int64_t rows_;
  const double* row_weight_;
  Rules rules_;
  const Loops& loops_;
  ColumnSort sort_;
  KMeans kmeans_;
  std::vector<float> ordered_;
  std::vector<double> moment_, mass_;
};

// How many of the `reserve` outliers of `count` ascending values come from the low end.
int64_t reserved_low(const float* ordered, int64_t count, int64_t reserve, bool from_both_sides);

// Nearest float16, ties to even, of a value in [0, 65504].
uint16_t double_to_half(double value);

}  // namespace claq::quantize
