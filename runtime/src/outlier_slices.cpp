#include "outlier_slices.h"

#include <algorithm>
#include <array>

#include "round_up.h"

namespace claq {
namespace {

// Entries that a slice may be padded to: a row that is kept whole among others that have few must not cost sixteen.
int64_t most_padded(int64_t entries) { return entries + entries / 2 + 8 * kSliceOutputs; }

}  // namespace

const OutlierSlices* SlicedOutliers::make(const LayerView& layer) {
  arrange(layer);
  value_.reset(new uint16_t[static_cast<size_t>(length_)]);
  if (layer.wide_outlier_index) copy(layer, wide_index_);
  else copy(layer, narrow_index_);
  const void* index = layer.wide_outlier_index ? static_cast<const void*>(wide_index_.get()) : narrow_index_.get();
  view_ = {slices_.data(), count_.data(), output_.data(), slot_.data(), index, value_.get()};
  return &view_;
}

void SlicedOutliers::arrange(const LayerView& layer) {
  const int64_t slots = round_up(layer.out_features, kNarrowestTile);
  count_.resize(static_cast<size_t>(slots));
  output_.resize(count_.size());
  slot_.resize(count_.size());
  const auto entries_of = [&](int64_t n) { return n < layer.out_features ? layer.outlier_ptr[n + 1] - layer.outlier_ptr[n] : 0; };
  for (int64_t first = 0; first < slots; first += kNarrowestTile) {
    // Most entries first, then in order; each as entries and output in one number, which compares fastest.
    constexpr int64_t kOutputs = 256;
    std::array<int64_t, kNarrowestTile> order;
    for (size_t i = 0; i < order.size(); ++i) order[i] = -kOutputs * entries_of(first + static_cast<int64_t>(i)) + static_cast<int64_t>(i);
    std::sort(order.begin(), order.end());
    for (size_t i = 0; i < order.size(); ++i) {
      const size_t place = static_cast<size_t>(first) + i;
      output_[place] = static_cast<uint8_t>(order[i] & (kOutputs - 1));
      count_[place] = entries_of(first + output_[place]);
      slot_[static_cast<size_t>(first) + output_[place]] = static_cast<uint8_t>(i);
    }
  }
  for (int64_t first = 0; first < slots; first += kSliceOutputs) {
    const int32_t* counts = count_.data() + first;
    int64_t entries = 0;
    for (int s = 0; s < kSliceOutputs; ++s) entries += counts[s];
    const int64_t padded = int64_t{kSliceOutputs} * counts[0];
    const bool regular = padded <= most_padded(entries);
    slices_.push_back({length_, regular ? counts[0] : kAsRows});
    if (regular) length_ += padded;
  }
}

template <class Index>
void SlicedOutliers::copy(const LayerView& layer, std::unique_ptr<Index[]>& index) {
  index.reset(new Index[static_cast<size_t>(length_)]);
  const auto* from = static_cast<const Index*>(layer.outlier_index);
  for (size_t slice = 0; slice < slices_.size(); ++slice) {
    if (slices_[slice].steps == kAsRows) continue;
    const auto tile = static_cast<int64_t>(slice) * kSliceOutputs / kNarrowestTile * kNarrowestTile;
    const size_t place = slice * kSliceOutputs;
    int64_t entry[kSliceOutputs];
    for (size_t s = 0; s < kSliceOutputs; ++s) entry[s] = count_[place + s] ? layer.outlier_ptr[tile + output_[place + s]] : 0;
    int64_t to = slices_[slice].first;
    size_t present = kSliceOutputs;  // slots that have an entry j; the first ones have the most
    for (int64_t j = 0; j < slices_[slice].steps; ++j, to += kSliceOutputs) {
      while (count_[place + present - 1] <= j) --present;
      for (size_t s = 0; s < present; ++s) {
        index[static_cast<size_t>(to) + s] = from[entry[s] + j];
        value_[static_cast<size_t>(to) + s] = layer.outlier_value[entry[s] + j];
      }
      for (size_t s = present; s < kSliceOutputs; ++s) index[static_cast<size_t>(to) + s] = value_[static_cast<size_t>(to) + s] = 0;
    }
  }
}

}  // namespace claq
