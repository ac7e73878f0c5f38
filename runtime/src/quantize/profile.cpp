// What columns would cost at several widths with several numbers of outliers (claq_export/algorithm/kmeans.py,
// SortedColumns): each is sorted once, and every combination is a Lloyd on an interval of the sorted values.
#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "../layer.h"
#include "../parallel.h"
#include "claq.h"
#include "column.h"
#include "kmeans.h"
#include "quantize.h"
#include "sort.h"

namespace claq::quantize {
namespace {

constexpr double kSecondsPerValue = 1e-8;
constexpr double kSecondsPerFit = 3e-6;

class ColumnProfile {
 public:
  ColumnProfile(const claq_profile_desc& desc, const Loops& loops)
      : desc_(desc),
        loops_(loops),
        sort_(desc.rows, false),
        ordered_(static_cast<size_t>(desc.rows)),
        moment_(static_cast<size_t>(desc.rows) + 1),
        square_(static_cast<size_t>(desc.rows) + 1) {}

  // False if a value is not finite.
  bool measure(const float* column, double* error) {
    const int64_t rows = desc_.rows;
    sort_.sort(column, rows, ordered_.data());
    if (!std::isfinite(ordered_.front()) || !std::isfinite(ordered_.back())) return false;
    for (int64_t i = 0; i < rows; ++i) {
      const double value = ordered_[static_cast<size_t>(i)];
      moment_[static_cast<size_t>(i) + 1] = moment_[static_cast<size_t>(i)] + value;
      square_[static_cast<size_t>(i) + 1] = square_[static_cast<size_t>(i)] + value * value;
    }
    companding_.take(ordered_.data(), rows);
    companding_.compand(loops_);
    for (int64_t m = 0; m < desc_.reserves; ++m) {
      const int64_t low = reserved_low(ordered_.data(), rows, desc_.reserve[m], false);
      const int64_t high = low + rows - desc_.reserve[m];
      for (int64_t w = 0; w < desc_.widths; ++w) error[w * desc_.reserves + m] = fit(1 << desc_.width[w], low, high);
    }
    return true;
  }

 private:
  double fit(int k, int64_t low, int64_t high) {
    double centroids[kMostCentroids];
    start(k, low, high, centroids);
    const SortedValues data{ordered_.data() + low, high - low, moment_.data() + low, nullptr};
    int64_t borders[kMostCentroids + 1];
    lloyd(data, k, desc_.most_iterations, centroids, borders);
    double error = square_[static_cast<size_t>(high)] - square_[static_cast<size_t>(low)];
    for (int c = 0; c < k; ++c) {
      const double inside = static_cast<double>(std::max<int64_t>(borders[c + 1] - borders[c], 1));
      const double sum = data.moment[borders[c + 1]] - data.moment[borders[c]];
      error -= sum * sum / inside;
    }
    return std::max(error, 0.0);
  }

  // Quantiles of the companding curve between the ends of the interval.
  void start(int k, int64_t low, int64_t high, double* centroids) const {
    const double* curve = companding_.curve();
    const float* sample = companding_.sample();
    const int64_t size = companding_.size();
    const auto height = [&](float end) { return curve[std::min(first_not_below(sample, size, end), size - 1)]; };
    const double bottom = height(ordered_[static_cast<size_t>(low)]), top = height(ordered_[static_cast<size_t>(high - 1)]);
    for (int c = 0; c < k; ++c) {
      const double target = bottom + (c + 0.5) / k * (top - bottom);
      const int64_t above = std::min<int64_t>(std::lower_bound(curve, curve + size, target) - curve, size - 1);
      const int64_t below = std::max<int64_t>(above - 1, 0);
      const double share = (target - curve[below]) / std::max(curve[above] - curve[below], 1e-300);
      const double from = sample[below], to = sample[above];
      centroids[c] = from + std::min(std::max(share, 0.0), 1.0) * (to - from);
    }
  }

  const claq_profile_desc& desc_;
  const Loops& loops_;
  ColumnSort sort_;
  Companding companding_;
  std::vector<float> ordered_;
  std::vector<double> moment_, square_;
};

void validate(const claq_profile_desc& desc) {
  check_rows(desc.rows);
  if (desc.columns < 1) throw InvalidArgument("columns: is " + std::to_string(desc.columns) + ", expected at least 1");
  if (!desc.target || !desc.width || !desc.reserve || !desc.error) throw InvalidArgument("a pointer that may not be NULL is NULL");
  if (desc.widths < 1 || desc.reserves < 1) throw InvalidArgument("widths or reserves: is below 1");
  if (desc.most_iterations < 1) throw InvalidArgument("most_iterations: is below 1");
  for (int64_t w = 0; w < desc.widths; ++w) check_width(desc.width[w], w);
  for (int64_t m = 0; m < desc.reserves; ++m) check_reserve(desc.reserve[m], desc.rows, m);
}

}  // namespace

void profile_columns(const claq_profile_desc& desc, const Host& host) {
  if (desc.struct_size != sizeof desc) throw InvalidArgument("desc: struct_size is not that of this version of libclaq");
  validate(desc);
  const Loops& loops = choose_loops(desc.kernel);
  const int64_t fits = desc.widths * desc.reserves;
  const double seconds =
      static_cast<double>(desc.columns) * (static_cast<double>(desc.rows) * kSecondsPerValue + static_cast<double>(fits) * kSecondsPerFit);
  const int64_t tasks = task_count(host, seconds, desc.columns);
  for_each(host, tasks, [&](int64_t task) {
    ColumnProfile column(desc, loops);
    for (int64_t c = desc.columns * task / tasks; c < desc.columns * (task + 1) / tasks; ++c) {
      if (!column.measure(desc.target + c * desc.rows, desc.error + c * fits)) {
        throw InvalidArgument("target: column " + std::to_string(c) + " holds a value that is not finite");
      }
    }
  });
}

}  // namespace claq::quantize
