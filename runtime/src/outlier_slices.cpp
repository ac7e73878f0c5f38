#include "outlier_slices.h"

#include <algorithm>
#include <array>

namespace claq {
namespace {

// Entries that a slice may be padded to: a row that is kept whole among others that have few must not cost sixteen.
int64_t most_padded(int64_t entries) { return entries + entries / 2 + 8 * kSliceOutputs; }

}  // namespace

const OutlierSlices* SlicedOutliers::make(const LayerView& layer) {
  arrange(layer);
  if (layer.wide_outlier_index) copy(layer, wide_index_);
  else copy(layer, narrow_index_);
  const void* index = layer.wide_outlier_index ? static_cast<const void*>(wide_index_.data()) : narrow_index_.data();
  view_ = {slices_.data(), count_.data(), output_.data(), slot_.data(), index, value_.data()};
  return &view_;
}

void SlicedOutliers::arrange(const LayerView& layer) {
  const int64_t slots = (layer.out_features + kNarrowestTile - 1) / kNarrowestTile * kNarrowestTile;
  count_.resize(static_cast<size_t>(slots));
  output_.resize(count_.size());
  slot_.resize(count_.size());
  const auto entries_of = [&](int64_t n) { return n < layer.out_features ? layer.outlier_ptr[n + 1] - layer.outlier_ptr[n] : 0; };
  for (int64_t first = 0; first < slots; first += kNarrowestTile) {
    std::array<uint8_t, kNarrowestTile> order;
    for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<uint8_t>(i);
    std::stable_sort(order.begin(), order.end(), [&](uint8_t a, uint8_t b) { return entries_of(first + a) > entries_of(first + b); });
    for (size_t i = 0; i < order.size(); ++i) {
      const size_t place = static_cast<size_t>(first) + i;
      output_[place] = order[i];
      count_[place] = entries_of(first + order[i]);
      slot_[static_cast<size_t>(first) + order[i]] = static_cast<uint8_t>(i);
    }
  }
  int64_t length = 0;
  for (int64_t first = 0; first < slots; first += kSliceOutputs) {
    const int32_t* counts = count_.data() + first;
    int64_t entries = 0;
    for (int s = 0; s < kSliceOutputs; ++s) entries += counts[s];
    const int64_t padded = int64_t{kSliceOutputs} * counts[0];
    const bool regular = padded <= most_padded(entries);
    slices_.push_back({length, regular ? counts[0] : kAsRows});
    if (regular) length += padded;
  }
  value_.resize(static_cast<size_t>(length));
}

template <class Index>
void SlicedOutliers::copy(const LayerView& layer, std::vector<Index>& index) {
  index.resize(value_.size());
  const auto* from = static_cast<const Index*>(layer.outlier_index);
  for (size_t slice = 0; slice < slices_.size(); ++slice) {
    if (slices_[slice].steps == kAsRows) continue;
    const auto tile = static_cast<int64_t>(slice) * kSliceOutputs / kNarrowestTile * kNarrowestTile;
    for (size_t s = 0; s < kSliceOutputs; ++s) {
      const size_t place = slice * kSliceOutputs + s;
      if (count_[place] == 0) continue;
      const int64_t entry = layer.outlier_ptr[tile + output_[place]];
      size_t to = static_cast<size_t>(slices_[slice].first) + s;
      for (int64_t i = entry; i < entry + count_[place]; ++i, to += kSliceOutputs) {
        index[to] = from[i];
        value_[to] = layer.outlier_value[i];
      }
    }
  }
}

}  // namespace claq
