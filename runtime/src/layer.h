// The checked layer that kernels read: pointers into the caller's tensors and the small tables derived from them.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "claq.h"
#include "layout.h"
#include "outlier_slices.h"

namespace claq {

struct Family;

// A statement of the format that does not hold; the message names the tensor.
class InvalidLayer : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

class InvalidArgument : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

}  // namespace claq

struct claq_layer {
  claq::LayerView view{};
  const claq::Family* family = nullptr;
  // What `view` points to besides the caller's tensors.
  std::vector<uint8_t> table;
  std::vector<float> scale;
  std::vector<float> row_scale;
  std::vector<int32_t> gather;
  std::vector<float> bias;
  std::vector<std::unique_ptr<char[]>> aligned;  // copies of tensors that no kernel could read where they lie
  claq::SlicedOutliers sliced;
  // Count of code bytes read by all layers when this one was last run (run.cpp).
  mutable std::atomic<uint64_t> read_at{0};
};

namespace claq {

// A layer that is only gathered from (an embedding) keeps nothing that only products read.
enum class LayerUse { kAny, kGather };

std::unique_ptr<claq_layer> make_layer(const claq_layer_desc& desc, LayerUse use = LayerUse::kAny);

}  // namespace claq
