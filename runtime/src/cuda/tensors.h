// The tensors of a quantized layer in the memory of a GPU, checked: what a matrix product and a lookup both read.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

#include "../dtype.h"
#include "claq.h"

namespace claq::cuda {

// Takes memory of the device for as long as the layer lives.
using Allocate = std::function<void*(size_t bytes)>;

constexpr int kWidths[3] = {4, 3, 2};

struct Tensors {
  // `desc` describes the layer as for claq_create, but its data pointers are device memory, aligned to 16 bytes, which is
  // read in place. All parts but the codes are copied to the host once, to be checked, on the calling thread's context.
  // `dtype` is that of activations and of looked-up rows. Throws InvalidLayer, InvalidArgument, or Error of the driver.
  Tensors(const claq_layer_desc& desc, claq_dtype dtype, const Allocate& allocate);

  claq_dtype dtype;
  int64_t in_features, out_features;
  int64_t columns;    // stored
  int64_t blocks[3];  // of 32 columns, by width 4, 3, 2
  int64_t outliers;   // 0: the three tensors are not read
  const void *codes, *codebook, *scale, *row_scale, *order, *outlier_ptr, *outlier_index, *outlier_value;
  const void* bias;  // null where the layer has none; the kernels always read an order, which is made where it has none

  // Types as the kernels' names have them. Both indices are of one type, for which the kernels are compiled: they differ only
  // in layers of 65535 or 65536 columns, where the narrow one is widened.
  std::string type;
  std::string index;
};

}  // namespace claq::cuda
