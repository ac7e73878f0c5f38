// Exact one-dimensional k-means on sorted values: prefix sums, and a binary search of the borders a step.
//
// The same methods as claq_export/algorithm/kmeans.py, which describes them, in the same order of operations: given the same
// column both find the same centroids bit for bit.
#pragma once

#include <cstdint>
#include <vector>

#include "loops.h"

namespace claq::quantize {

constexpr int kMostCentroids = 16;

enum class Method { kLloyd = 0, kCoarse = 1, kOptimal = 2 };

// Ascending finite values; moment[i] and mass[i] are the weighted sum and the weight of the first i, for i = 0 .. count.
// `mass` null: every value counts once.
struct SortedValues {
  const float* values;
  int64_t count;
  const double* moment;
  const double* mass;

  double mass_between(int64_t from, int64_t to) const {
    return mass ? mass[to] - mass[from] : static_cast<double>(to - from);
  }
};

// Index of the first of `count` ascending values that is not below `bound`.
int64_t first_not_below(const float* values, int64_t count, double bound);

// Order statistics that describe the density of sorted values, and the companding curve through them.
class Companding {
 public:
  // Throws std::bad_alloc.
  Companding();
  // Takes samples of ascending values; the curve through them is made by compand().
  void take(const float* values, int64_t count);
  void compand(const Loops& loops);

  int64_t size() const { return size_; }
  const int64_t* index() const { return index_.data(); }
  const float* sample() const { return sample_.data(); }
  const double* curve() const { return curve_.data(); }
  // How often the value changes from one sample to the next.
  int64_t changes() const;

 private:
  void place(int64_t count);

  int64_t placed_for_ = -1;
  int64_t size_ = 0;
  std::vector<int64_t> index_;
  std::vector<double> share_;
  std::vector<float> sample_;
  std::vector<double> curve_;
};

// Scratch memory for columns of up to `most_values` values; one object serves one thread.
class KMeans {
 public:
  // Throws std::bad_alloc.
  KMeans(int64_t most_values, Method method, const Loops& loops);

  // `k` (2 to 16) ascending centroids. `start`: k ascending centroids to run Lloyd from instead of the method's own start.
  void fit(const SortedValues& data, int k, int most_iterations, const double* start, double* centroids);

 private:
  void companded_start(int k, double* centroids) const;
  static void spread_start(const SortedValues& data, int k, double* centroids);
  bool coarse_start(const SortedValues& data, int k, double* centroids);
  bool few_values(const SortedValues& data, int k, double* centroids);
  void best_partition(const SortedValues& data, int k, const int64_t* cuts, int64_t count, double* centroids);
  void optimal(const SortedValues& data, int k, double* centroids);
  void split(const SortedValues& data, int64_t low, int64_t high, int64_t left, int64_t right, int32_t* choice);

  Method method_;
  const Loops& loops_;
  Companding companding_;
  std::vector<double> gain_;
  std::vector<double> layers_;
  std::vector<double> best_, grown_, total_;
  std::vector<int32_t> choice_;
};

// Lloyd's steps from `centroids`, in place, until no value changes its cluster or no centroid moves by more than a share of
// the range; `borders` [k + 1] are those that the centroids are the means of.
void lloyd(const SortedValues& data, int k, int most_iterations, double* centroids, int64_t* borders);

}  // namespace claq::quantize
