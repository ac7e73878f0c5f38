#include "column.h"

#include <algorithm>
#include <cmath>

#include "../half.h"

namespace claq::quantize {
namespace {

constexpr double kHalfMost = 65504.0;
constexpr uint16_t kLargestHalf = 0x7bff;  // its bits
// Outliers are stored in units of the column scale as float16; stay clear of its end so that rounding cannot overflow.
constexpr double kOutlierReach = 60000.0;

// Centroids as int8 times a float16 that also expresses an outlier of magnitude `reach`.
uint16_t round_codebook(const double* centroids, int entries, double reach, int8_t* codebook, float* table) {
  double peak = 0;
  for (int e = 0; e < entries; ++e) peak = std::max(peak, std::fabs(centroids[e]));
  uint16_t bits = double_to_half(std::min(std::max(peak / 127.0, reach / kOutlierReach), kHalfMost));
  float scale = half_to_float(bits);
  const bool low = static_cast<double>(scale) * 127.5 < peak || (reach > 0 && static_cast<double>(scale) * 65000.0 < reach);
  if (low && bits < kLargestHalf) scale = half_to_float(++bits);
  for (int e = 0; e < kMostCentroids; ++e) {
    double integer = 0;
    if (e < entries && scale != 0) {
      integer = std::min(std::max(std::nearbyint(centroids[e] / static_cast<double>(scale)), -127.0), 127.0);
    }
    codebook[e] = static_cast<int8_t>(integer);
    if (e < entries) table[e] = static_cast<float>(integer) * scale;
  }
  return bits;
}

}  // namespace

uint16_t double_to_half(double value) {
  if (value == 0) return 0;
  const int exponent = std::max(std::ilogb(value), -14);
  // In units of the last place of its binade the value is rounded to an integer of up to 11 bits; a carry into the next binade
  // carries into the exponent's field as well.
  const auto units = static_cast<uint32_t>(std::nearbyint(std::ldexp(value, 10 - exponent)));
  return static_cast<uint16_t>(units + (static_cast<uint32_t>(exponent + 14) << 10));
}

int64_t reserved_low(const float* ordered, int64_t count, int64_t reserve, bool from_both_sides) {
  int64_t low = 0;
  if (from_both_sides) {
    low = reserve / 2;
    if (reserve % 2 && -ordered[low] > ordered[count - 1 - (reserve - low - 1)]) ++low;
    return low;
  }
  for (int64_t high = 0; low + high < reserve;) ++(-ordered[low] >= ordered[count - 1 - high] ? low : high);
  return low;
}

ColumnQuantizer::ColumnQuantizer(int64_t rows, const double* row_weight, const Rules& rules, const Loops& loops)
    : rows_(rows),
      row_weight_(row_weight),
      rules_(rules),
      loops_(loops),
      sort_(rows, row_weight != nullptr),
      kmeans_(rows, rules.method, loops),
      ordered_(static_cast<size_t>(rows)),
      moment_(static_cast<size_t>(rows) + 1),
      mass_(row_weight ? static_cast<size_t>(rows) + 1 : 0) {}

SortedValues ColumnQuantizer::inner_values(int64_t low, int64_t high) {
  const int64_t count = rows_ - low - high;
  const float* values = ordered_.data() + low;
  double* moment = moment_.data();
  moment[0] = 0;
  if (!row_weight_) {
    for (int64_t i = 0; i < count; ++i) moment[i + 1] = moment[i] + static_cast<double>(values[i]);
    return {values, count, moment, nullptr};
  }
  double* mass = mass_.data();
  mass[0] = 0;
  for (int64_t i = 0; i < count; ++i) {
    const double weight = row_weight_[sort_.rows()[low + i]];
    mass[i + 1] = mass[i] + weight;
    moment[i + 1] = moment[i] + weight * static_cast<double>(values[i]);
  }
  return {values, count, moment, mass};
}

// Of several equal values at an edge, the first rows go to the low end, the last ones to the high end.
void ColumnQuantizer::locate(const float* column, int64_t low, int64_t high, int32_t* found) const {
  int32_t* to = found;
  if (low) {
    const float edge = ordered_[static_cast<size_t>(low - 1)];
    int64_t equal = low;
    for (int64_t n = 0; n < rows_; ++n) equal -= column[n] < edge;
    for (int64_t n = 0; n < rows_; ++n) {
      if (column[n] < edge || (column[n] == edge && equal-- > 0)) *to++ = static_cast<int32_t>(n);
    }
  }
  if (high) {
    const float edge = ordered_[static_cast<size_t>(rows_ - high)];
    int64_t equal = high;
    for (int64_t n = 0; n < rows_; ++n) equal -= column[n] > edge;
    for (int64_t n = rows_ - 1; n >= 0; --n) {
      if (column[n] > edge || (column[n] == edge && equal-- > 0)) *to++ = static_cast<int32_t>(n);
    }
  }
  std::sort(found, to);
}

bool ColumnQuantizer::quantize(const float* column, int width, int64_t reserve, const double* start, const ColumnResult& result) {
  const int entries = 1 << width;
  sort_.sort(column, rows_, ordered_.data());
  if (!std::isfinite(ordered_.front()) || !std::isfinite(ordered_.back())) return false;
  int64_t low = 0, high = 0;
  double reach = 0;
  if (reserve) {
    low = reserved_low(ordered_.data(), rows_, reserve, rules_.from_both_sides);
    high = reserve - low;
    reach = static_cast<double>(std::max(std::fabs(ordered_.front()), std::fabs(ordered_.back())));
  }
  const SortedValues data = rules_.fit_outliers ? inner_values(0, 0) : inner_values(low, high);
  double centroids[kMostCentroids];
  kmeans_.fit(data, entries, rules_.most_iterations, start, centroids);
  float table[kMostCentroids];
  *result.scale = round_codebook(centroids, entries, reach, result.codebook, table);
  loops_.assign(column, rows_, table, entries, result.codes, result.value);
  const float scale = half_to_float(*result.scale);
  *result.outliers = 0;
  if (!reserve || !(scale > 0)) return true;
  locate(column, low, high, result.outlier_row);
  for (int64_t i = 0; i < reserve; ++i) {
    // In the order of operations of a reader of the format.
    const int32_t row = result.outlier_row[i];
    const auto entry = static_cast<float>(result.codebook[result.codes[row]]);
    result.outlier_extra[i] = float_to_half(column[row] / scale - entry);
    result.value[row] = (entry + half_to_float(result.outlier_extra[i])) * scale;
  }
  *result.outliers = reserve;
  return true;
}

}  // namespace claq::quantize
