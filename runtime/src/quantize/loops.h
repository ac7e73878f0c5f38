// The loops of quantization that gain from wide vectors, compiled once for each vector width.
//
// Every operation is elementwise and rounded on its own, in an order that does not depend on the width: all builds give
// the same bits, and these are the bits of the NumPy reference (claq_export/algorithm).
#pragma once

#include <cstdint>

namespace claq::quantize {

struct Loops {
  // columns[c][n] -= factors[c * stride + j] * errors[j][n] for j = first .. last - 1 in this order, c < count, n in
  // [begin, end). Rows of both matrices are `rows` apart.
  void (*feed_back)(float* columns, int64_t count, const float* factors, int64_t stride, const float* errors, int64_t first,
                    int64_t last, int64_t rows, int64_t begin, int64_t end);

  // The index of the table's nearest entry for each value, a value between two getting the lower one, and that entry.
  void (*assign)(const float* column, int64_t count, const float* table, int entries, uint8_t* codes, float* value);

  // error = (column - value) / divisor
  void (*divide_error)(const float* column, const float* value, float divisor, float* error, int64_t count);

  // gap^(21/32), in place.
  void (*compand)(double* gaps, int64_t count);

  // gain[i * stride + j] = (moment[j] - moment[i])^2 / (mass[j] - mass[i]) for i < j < count where that mass is positive,
  // else 0; minus infinity for i >= j and beyond `count`.
  void (*coarse_gain)(const double* moment, const double* mass, int64_t count, int64_t stride, double* gain);

  // after[j] = max over i of gain[i * stride + j] + before[i].
  void (*coarse_layer)(const double* gain, const double* before, int64_t count, int64_t stride, double* after);

  // total[i] = best[i] + (moment[end] - moment[i])^2 / (mass of i .. end) for i in [first, last); `mass` null: every value
  // counts once.
  void (*partition_gain)(const double* moment, const double* mass, const double* best, int64_t first, int64_t last,
                         int64_t end, double* total);
};

extern const Loops kPortableLoops;
#if defined(__x86_64__)
extern const Loops kAvx2Loops;
extern const Loops kAvx512Loops;
#endif

}  // namespace claq::quantize
