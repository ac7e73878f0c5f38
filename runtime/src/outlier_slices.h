// The copy of a layer's outliers that LayerView::outlier_slices points to.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "layout.h"

namespace claq {

class SlicedOutliers {
 public:
  // Copies the outliers of a layer that has some; what it returns lives as long as this.
  const OutlierSlices* make(const LayerView& layer);

 private:
  template <class Index>
  void copy(const LayerView& layer, std::unique_ptr<Index[]>& index);
  void arrange(const LayerView& layer);

  OutlierSlices view_{};
  std::vector<OutlierSlice> slices_;
  std::vector<int32_t> count_;
  std::vector<uint8_t> output_, slot_;
  int64_t length_ = 0;  // of these, which no vector need set to zeros first
  std::unique_ptr<uint16_t[]> narrow_index_;
  std::unique_ptr<int32_t[]> wide_index_;
  std::unique_ptr<uint16_t[]> value_;
};

}  // namespace claq
