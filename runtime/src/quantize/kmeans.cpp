#include "kmeans.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

namespace claq::quantize {
namespace {

constexpr int64_t kCandidates = 64;
constexpr int64_t kSamples = 384;
constexpr int64_t kTail = 48;
// At most 2 * kSamples - 1 values in between where there are just too few to skip any, and the tails.
constexpr int64_t kMostSamples = 2 * kSamples + 2 * kTail;
constexpr int64_t kGainStride = (kCandidates + 1 + 7) / 8 * 8;
constexpr double kTolerance = 2e-4;

// The float that is exceeded by just those floats that exceed-or-equal `bound`: v < bound if and only if v < this.
float ceiling(double bound) {
  const float rounded = static_cast<float>(bound);
  return static_cast<double>(rounded) < bound ? std::nextafter(rounded, std::numeric_limits<float>::infinity()) : rounded;
}

// All searches go down the same number of levels side by side, without a branch that could be mispredicted.
void find_borders(const float* values, int64_t count, const double* centroids, int k, int64_t* borders) {
  float bounds[kMostCentroids];
  int64_t* found = borders + 1;
  for (int c = 0; c + 1 < k; ++c) {
    bounds[c] = ceiling((centroids[c + 1] + centroids[c]) * 0.5);
    found[c] = 0;
  }
  int64_t length = count;
  while (length > 1) {
    const int64_t half = length / 2;
    for (int c = 0; c + 1 < k; ++c) found[c] += values[found[c] + half - 1] < bounds[c] ? half : 0;
    length -= half;
  }
  for (int c = 0; c + 1 < k; ++c) found[c] += values[found[c]] < bounds[c];
}

double mean(const SortedValues& data, int64_t from, int64_t to) {
  const double mass = data.mass_between(from, to);
  return mass > 0 ? (data.moment[to] - data.moment[from]) / mass : data.values[std::min(from, data.count - 1)];
}

}  // namespace

int64_t first_not_below(const float* values, int64_t count, double bound) {
  const float limit = ceiling(bound);
  return std::lower_bound(values, values + count, limit) - values;
}

Companding::Companding() : index_(kMostSamples), share_(kMostSamples), sample_(kMostSamples), curve_(kMostSamples) {}

void Companding::place(int64_t count) {
  const int64_t stride = std::max<int64_t>(1, count / kSamples), tail = std::min(count, kTail);
  size_ = 0;
  for (int64_t i = 0; i < tail; ++i) index_[static_cast<size_t>(size_++)] = i;
  int64_t between = tail;
  for (int64_t i = std::max(tail, count - tail); i < count; ++i) {
    for (; between < i; between += stride) index_[static_cast<size_t>(size_++)] = between;
    if (between == i) between += stride;
    index_[static_cast<size_t>(size_++)] = i;
  }
  for (int64_t i = 0; i + 1 < size_; ++i) {
    // The cube root (11/32 to the 21/32 of the gaps) of how many values a gap stands for.
    const double quarter = std::sqrt(std::sqrt(static_cast<double>(index_[static_cast<size_t>(i + 1)] - index_[static_cast<size_t>(i)])));
    const double sixteenth = std::sqrt(std::sqrt(quarter));
    share_[static_cast<size_t>(i)] = quarter * sixteenth * std::sqrt(sixteenth);
  }
  placed_for_ = count;
}

void Companding::take(const float* values, int64_t count) {
  if (count != placed_for_) place(count);
  for (int64_t i = 0; i < size_; ++i) sample_[static_cast<size_t>(i)] = values[index_[static_cast<size_t>(i)]];
}

void Companding::compand(const Loops& loops) {
  double* curve = curve_.data();
  for (int64_t i = 0; i + 1 < size_; ++i) {
    curve[i + 1] = static_cast<double>(sample_[static_cast<size_t>(i + 1)]) - static_cast<double>(sample_[static_cast<size_t>(i)]);
  }
  loops.compand(curve + 1, size_ - 1);
  curve[0] = 0;
  for (int64_t i = 0; i + 1 < size_; ++i) curve[i + 1] = curve[i] + curve[i + 1] * share_[static_cast<size_t>(i)];
}

int64_t Companding::changes() const {
  int64_t changes = 0;
  for (int64_t i = 0; i + 1 < size_; ++i) changes += sample_[static_cast<size_t>(i)] != sample_[static_cast<size_t>(i + 1)];
  return changes;
}

void lloyd(const SortedValues& data, int k, int most_iterations, double* centroids, int64_t* borders) {
  int64_t seen[kMostCentroids + 1];
  double moved[kMostCentroids];
  const size_t size = static_cast<size_t>(k + 1) * sizeof(int64_t);
  borders[0] = 0;
  borders[k] = data.count;
  std::fill(seen, seen + k + 1, int64_t{-1});
  const double near = kTolerance * (static_cast<double>(data.values[data.count - 1]) - static_cast<double>(data.values[0]));
  for (int step = 0; step < most_iterations; ++step) {
    find_borders(data.values, data.count, centroids, k, borders);
    if (std::memcmp(borders, seen, size) == 0) return;
    std::memcpy(seen, borders, size);
    double farthest = 0;
    for (int c = 0; c < k; ++c) {
      const double mass = data.mass_between(borders[c], borders[c + 1]);
      moved[c] = mass > 0 ? (data.moment[borders[c + 1]] - data.moment[borders[c]]) / mass : centroids[c];
      farthest = std::max(farthest, std::fabs(moved[c] - centroids[c]));
    }
    std::memcpy(centroids, moved, static_cast<size_t>(k) * sizeof(double));
    if (farthest < near) return;
  }
}

KMeans::KMeans(int64_t most_values, Method method, const Loops& loops) : method_(method), loops_(loops) {
  if (method == Method::kOptimal) {
    const size_t size = static_cast<size_t>(most_values) + 1;
    best_.resize(size);
    grown_.resize(size);
    total_.resize(size);
    choice_.resize(size * (kMostCentroids - 1));
  } else {
    gain_.resize(static_cast<size_t>((kCandidates + 1) * kGainStride));
    layers_.resize(static_cast<size_t>((kMostCentroids - 1) * kGainStride));
  }
}

void KMeans::companded_start(int k, double* centroids) const {
  const double* curve = companding_.curve();
  const float* sample = companding_.sample();
  const int64_t last = companding_.size() - 1;
  const double step = curve[last] / k;
  for (int c = 0; c < k; ++c) {
    const double target = (c + 0.5) * step;
    const int64_t above = std::upper_bound(curve, curve + last + 1, target) - curve;
    const int64_t i = std::min(std::max<int64_t>(above - 1, 0), last - 1);
    const double low = sample[i], high = sample[i + 1];
    centroids[c] = low + (target - curve[i]) * ((high - low) / (curve[i + 1] - curve[i]));
  }
}

// k of the different values, evenly spread.
void KMeans::spread_start(const SortedValues& data, int k, double* centroids) {
  const float* values = data.values;
  const int64_t n = data.count;
  int64_t distinct = 1;
  for (int64_t i = 1; i < n; ++i) distinct += values[i] != values[i - 1];
  int c = 0;
  int64_t rank = 0;
  for (int64_t i = 0; i < n && c < k; ++i) {
    if (i > 0 && values[i] == values[i - 1]) continue;
    if (rank == static_cast<int64_t>((c + 0.5) / k * static_cast<double>(distinct))) centroids[c++] = values[i];
    ++rank;
  }
  for (; c < k; ++c) centroids[c] = values[n - 1];
}

bool KMeans::coarse_start(const SortedValues& data, int k, double* centroids) {
  const double* curve = companding_.curve();
  const int64_t size = companding_.size();
  int64_t cuts[kCandidates + 1];
  const double step = curve[size - 1] / kCandidates;
  int64_t at = 0, count = 0;
  for (int64_t c = 0; c <= kCandidates; ++c) {
    const double target = c == kCandidates ? curve[size - 1] : static_cast<double>(c) * step;
    while (curve[at] < target) ++at;
    const int64_t cut = c == 0 ? 0 : c == kCandidates ? data.count : companding_.index()[at];
    if (c == 0 || cut > cuts[count - 1]) cuts[count++] = cut;
  }
  if (count < k + 1) return false;
  best_partition(data, k, cuts, count, centroids);
  return true;
}

// At most k different values are the centroids, and the last repeats. At most kCandidates: each border between two is a candidate, so
// this is the optimum.
bool KMeans::few_values(const SortedValues& data, int k, double* centroids) {
  const int64_t most = method_ == Method::kOptimal ? k : kCandidates;
  const float* values = data.values;
  int64_t cuts[kCandidates + 1];
  int64_t distinct = 0;
  for (int64_t i = 0; i < data.count; ++i) {
    if (i > 0 && values[i] == values[i - 1]) continue;
    if (distinct == most) return false;
    cuts[distinct++] = i;
  }
  if (distinct <= k) {
    for (int c = 0; c < k; ++c) centroids[c] = values[cuts[std::min<int64_t>(c, distinct - 1)]];
  } else {
    cuts[distinct] = data.count;
    best_partition(data, k, cuts, distinct + 1, centroids);
  }
  return true;
}

// The best of those whose borders are among `cuts`, `count` ascending ones from 0 to the number of values, more than k.
void KMeans::best_partition(const SortedValues& data, int k, const int64_t* cuts, int64_t count, double* centroids) {
  double moment[kCandidates + 1], mass[kCandidates + 1];
  for (int64_t c = 0; c < count; ++c) {
    moment[c] = data.moment[cuts[c]];
    mass[c] = data.mass ? data.mass[cuts[c]] : static_cast<double>(cuts[c]);
  }
  double* gain = gain_.data();
  double* layers = layers_.data();
  loops_.coarse_gain(moment, mass, count, kGainStride, gain);
  // What the first cluster gains, then the best sums of two, three, ... clusters up to each cut.
  std::memcpy(layers, gain, kGainStride * sizeof(double));
  for (int level = 1; level + 1 < k; ++level) {
    loops_.coarse_layer(gain, layers + (level - 1) * kGainStride, count, kGainStride, layers + level * kGainStride);
  }
  int64_t chosen[kMostCentroids + 1];
  chosen[0] = 0;
  chosen[k] = count - 1;
  for (int level = k - 1; level > 0; --level) {
    const double* before = layers + (level - 1) * kGainStride;
    const int64_t end = chosen[level + 1];
    double top = gain[end] + before[0];
    chosen[level] = 0;
    for (int64_t i = 1; i < count; ++i) {
      const double total = gain[i * kGainStride + end] + before[i];
      if (total > top) {
        top = total;
        chosen[level] = i;
      }
    }
  }
  for (int c = 0; c < k; ++c) centroids[c] = mean(data, cuts[chosen[c]], cuts[chosen[c + 1]]);
}

// The best last border never moves left as more values are taken in.
void KMeans::split(const SortedValues& data, int64_t low, int64_t high, int64_t left, int64_t right, int32_t* choice) {
  while (low <= high) {
    const int64_t middle = (low + high) / 2, last = std::min(right, middle);
    loops_.partition_gain(data.moment, data.mass, best_.data(), left, last + 1, middle, total_.data());
    int64_t first = left;
    for (int64_t i = left + 1; i <= last; ++i) {
      if (total_[static_cast<size_t>(i)] > total_[static_cast<size_t>(first)]) first = i;
    }
    grown_[static_cast<size_t>(middle)] = total_[static_cast<size_t>(first)];
    choice[middle] = static_cast<int32_t>(first);
    split(data, low, middle - 1, left, first, choice);
    low = middle + 1;
    left = first;
  }
}

void KMeans::optimal(const SortedValues& data, int k, double* centroids) {
  const int64_t n = data.count;
  for (int64_t end = 0; end <= n; ++end) {
    const double mass = data.mass_between(0, end), moment = data.moment[end] - data.moment[0];
    best_[static_cast<size_t>(end)] = mass > 0 ? moment * moment / mass : 0.0;
  }
  for (int level = 1; level < k; ++level) {
    split(data, 0, n, 0, n, choice_.data() + (level - 1) * (n + 1));
    best_.swap(grown_);
  }
  int64_t borders[kMostCentroids + 1];
  borders[0] = 0;
  borders[k] = n;
  for (int level = k - 1; level > 0; --level) borders[level] = choice_[static_cast<size_t>((level - 1) * (n + 1) + borders[level + 1])];
  for (int c = 0; c < k; ++c) centroids[c] = mean(data, borders[c], borders[c + 1]);
}

void KMeans::fit(const SortedValues& data, int k, int most_iterations, const double* start, double* centroids) {
  int64_t borders[kMostCentroids + 1];
  if (start) {
    std::memcpy(centroids, start, static_cast<size_t>(k) * sizeof(double));
    lloyd(data, k, most_iterations, centroids, borders);
    return;
  }
  companding_.take(data.values, data.count);
  const int64_t changes = companding_.changes();
  if (changes < kCandidates && few_values(data, k, centroids)) return;
  if (method_ == Method::kOptimal) return optimal(data, k, centroids);
  bool started = changes > 2 * k;
  if (started) {
    companding_.compand(loops_);
    if (method_ == Method::kCoarse) started = coarse_start(data, k, centroids);
    else companded_start(k, centroids);
  }
  if (!started) spread_start(data, k, centroids);
  lloyd(data, k, most_iterations, centroids, borders);
}

}  // namespace claq::quantize
