// The column loop of quantization behind the C interface: columns that feed their error back, or many on their own.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <string>
#include <vector>

#include "../family.h"
#include "../layer.h"
#include "../parallel.h"
#include "claq.h"
#include "column.h"
#include "quantize.h"

namespace claq::quantize {
namespace {

// Columns between two uses of all earlier errors: each of these is then read once for so many columns.
constexpr int64_t kGroup = 8;

void check(bool holds, const std::string& message) {
  if (!holds) throw InvalidArgument(message);
}

void validate(const claq_columns_desc& desc) {
  check(desc.columns >= 1 && desc.columns < int64_t{1} << 24, "columns: is " + std::to_string(desc.columns) + ", expected 1 to 2^24 - 1");
  check_rows(desc.rows);
  check(desc.width && desc.reserve && desc.target && desc.value && desc.codes && desc.codebook && desc.scale && desc.outliers,
        "a pointer that may not be NULL is NULL");
  check(!desc.feedback || desc.error, "error: is NULL, but there is feedback");
  check(desc.method >= CLAQ_KMEANS_LLOYD && desc.method <= CLAQ_KMEANS_OPTIMAL, "method: is " + std::to_string(desc.method) + ", expected 0 to 2");
  check(desc.most_iterations >= 1, "most_iterations: is " + std::to_string(desc.most_iterations) + ", expected at least 1");
  int64_t reserved = 0;
  for (int64_t c = 0; c < desc.columns; ++c) {
    check_width(desc.width[c], c);
    check_reserve(desc.reserve[c], desc.rows, c);
    reserved += desc.reserve[c];
    if (!desc.start) continue;
    const double* start = desc.start + c * kMostCentroids;
    for (int e = 0; e < 1 << desc.width[c]; ++e) {
      check(std::isfinite(start[e]) && (e == 0 || start[e - 1] <= start[e]),
            "start: centroids of column " + std::to_string(c) + " are not finite and ascending");
    }
  }
  check(reserved == 0 || (desc.outlier_row && desc.outlier_extra), "outlier_row or outlier_extra: is NULL, but weights are reserved");
  for (int64_t n = 0; desc.row_weight && n < desc.rows; ++n) {
    check(desc.row_weight[n] >= 0 && std::isfinite(desc.row_weight[n]), "row_weight: element " + std::to_string(n) + " is not finite or negative");
  }
}

class ColumnLoop {
 public:
  ColumnLoop(const claq_columns_desc& desc, const Host& host)
      : desc_(desc),
        host_(host),
        loops_(choose_loops(desc.kernel)),
        rules_{static_cast<Method>(desc.method), desc.most_iterations, desc.both_sides != 0, desc.fit_outliers != 0},
        first_outlier_(static_cast<size_t>(desc.columns)) {
    int64_t sum = 0;
    for (int64_t c = 0; c < desc.columns; ++c) {
      first_outlier_[static_cast<size_t>(c)] = sum;
      sum += desc.reserve[c];
    }
  }

  void run() {
    if (desc_.feedback) {
      with_feedback();
    } else {
      const int64_t tasks = task_count(host_, kSecondsPerValue * static_cast<double>(desc_.columns * desc_.rows), desc_.columns);
      for_each(host_, tasks, [&](int64_t task) {
        ColumnQuantizer quantizer = make_quantizer();
        for (int64_t c = desc_.columns * task / tasks; c < desc_.columns * (task + 1) / tasks; ++c) quantize(quantizer, c);
      });
    }
  }

 private:
  ColumnQuantizer make_quantizer() const { return {desc_.rows, desc_.row_weight, rules_, loops_}; }

  void quantize(ColumnQuantizer& quantizer, int64_t c) const {
    const int64_t at = c * desc_.rows, outlier = first_outlier_[static_cast<size_t>(c)];
    const bool finite = quantizer.quantize(
        desc_.target + at, desc_.width[c], desc_.reserve[c], desc_.start ? desc_.start + c * kMostCentroids : nullptr,
        {desc_.codes + at, desc_.value + at, desc_.codebook + c * kMostCentroids, desc_.scale + c, desc_.outliers + c,
         desc_.outlier_row ? desc_.outlier_row + outlier : nullptr, desc_.outlier_extra ? desc_.outlier_extra + outlier : nullptr});
    check(finite, "target: column " + std::to_string(c) + " holds a value that is not finite");
  }

  void with_feedback() {
    ColumnQuantizer quantizer = make_quantizer();
    const int64_t rows = desc_.rows, columns = desc_.columns;
    for (int64_t group = 0; group < columns; group += kGroup) {
      const int64_t end = std::min(group + kGroup, columns);
      timed([&] { take_off(group, end, 0, group); });
      for (int64_t c = group; c < end; ++c) {
        quantize(quantizer, c);
        timed([&] {
          const int64_t at = c * rows;
          loops_.divide_error(desc_.target + at, desc_.value + at, desc_.feedback[c * columns + c], desc_.error + at, rows);
          take_off(c + 1, end, c, c + 1);
        });
      }
    }
    if (desc_.feedback_seconds) *desc_.feedback_seconds = feedback_time_.count();
  }

  template <class Body>
  void timed(Body body) {
    const auto began = std::chrono::steady_clock::now();
    body();
    feedback_time_ += std::chrono::steady_clock::now() - began;
  }

  // Takes what columns [begin, end) owe the errors of columns [first, last) off them.
  void take_off(int64_t begin, int64_t end, int64_t first, int64_t last) const {
    if (begin >= end || first >= last) return;
    const int64_t rows = desc_.rows, columns = desc_.columns;
    const double products = static_cast<double>((end - begin) * (last - first) * rows);
    const int64_t tasks = task_count(host_, products * kSecondsPerProduct, (rows + kStripe - 1) / kStripe);
    for_each(host_, tasks, [&](int64_t task) {
      loops_.feed_back(desc_.target + begin * rows, end - begin, desc_.feedback + begin * columns, columns, desc_.error, first, last,
                       rows, rows * task / tasks, rows * (task + 1) / tasks);
    });
  }

  static constexpr double kSecondsPerValue = 8e-9;
  static constexpr double kSecondsPerProduct = 5e-11;
  static constexpr int64_t kStripe = 256;

  const claq_columns_desc& desc_;
  const Host host_;
  const Loops& loops_;
  const Rules rules_;
  std::vector<int64_t> first_outlier_;
  std::chrono::duration<double> feedback_time_{0};
};

}  // namespace

void check_rows(int64_t rows) {
  check(rows >= 1 && rows < int64_t{1} << 31, "rows: is " + std::to_string(rows) + ", expected 1 to 2^31 - 1");
}

void check_width(int32_t width, int64_t index) {
  check(width >= 2 && width <= 4, "width: element " + std::to_string(index) + " is " + std::to_string(width) + ", expected 2, 3 or 4");
}

void check_reserve(int64_t reserve, int64_t rows, int64_t index) {
  check(reserve >= 0 && reserve < rows,
        "reserve: element " + std::to_string(index) + " is " + std::to_string(reserve) + ", expected 0 to " + std::to_string(rows - 1));
}

const Loops& choose_loops(const char* kernel) {
  [[maybe_unused]] const Vectors vectors = choose_vectors(kernel);
#if defined(__x86_64__)
  if (vectors == Vectors::kAvx512) return kAvx512Loops;
  if (vectors == Vectors::kAvx2) return kAvx2Loops;
#endif
  return kPortableLoops;
}

void quantize_columns(const claq_columns_desc& desc, const Host& host) {
  if (desc.struct_size != sizeof desc) throw InvalidArgument("desc: struct_size is not that of this version of libclaq");
  validate(desc);
  ColumnLoop(desc, host).run();
}

}  // namespace claq::quantize
