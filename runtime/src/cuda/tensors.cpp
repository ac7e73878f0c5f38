#include "tensors.h"

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "../layer.h"
#include "../layout.h"
#include "../validate.h"
#include "driver.h"
#include "launch.h"

namespace claq::cuda {
namespace {

size_t count_of(const claq_tensor& tensor) {
  size_t count = 1;
  for (int32_t i = 0; i < tensor.rank; ++i) count *= static_cast<size_t>(std::max<int64_t>(0, tensor.shape[i]));
  return count;
}

const char* name_of(claq_dtype dtype) {
  switch (dtype) {
    case CLAQ_FLOAT32: return "fp32";
    case CLAQ_FLOAT16: return "fp16";
    case CLAQ_BFLOAT16: return "bf16";
    default: throw InvalidArgument("x: expected float32, float16 or bfloat16");
  }
}

// Checks a layer whose tensors are on a device: validation reads copies of all but the codes, any of which is valid.
void validate_on_host(claq_layer_desc desc) {
  const Driver& driver = Driver::get();
  std::vector<std::vector<unsigned char>> copies;
  for (claq_tensor* tensor : {&desc.codebook, &desc.scale, &desc.row_scale, &desc.order, &desc.outlier_ptr, &desc.outlier_index,
                              &desc.outlier_value, &desc.bias}) {
    if (tensor->rank != 1 || !tensor->shape || !tensor->data) continue;  // validate says what is wrong with it
    const size_t bytes = count_of(*tensor) * size_of(tensor->dtype);
    auto& copy = copies.emplace_back(std::max<size_t>(1, bytes));
    driver.to_host(copy.data(), tensor->data, bytes);
    tensor->data = copy.data();
  }
  validate(desc);
}

void* upload(const void* data, size_t bytes, const Allocate& allocate) {
  void* memory = allocate(bytes);
  Driver::get().to_device(memory, data, bytes);
  return memory;
}

// 16-bit indices on the device as 32-bit ones.
void* widened(const claq_tensor& tensor, const Allocate& allocate) {
  std::vector<uint16_t> narrow(count_of(tensor));
  Driver::get().to_host(narrow.data(), tensor.data, narrow.size() * sizeof(uint16_t));
  const std::vector<int32_t> wide(narrow.begin(), narrow.end());
  return upload(wide.data(), wide.size() * sizeof(int32_t), allocate);
}

}  // namespace

Tensors::Tensors(const claq_layer_desc& desc, claq_dtype type_of_values, const Allocate& allocate)
    : dtype(type_of_values), type(name_of(type_of_values)) {
  validate_on_host(desc);
  in_features = desc.in_features;
  out_features = desc.out_features;
  columns = desc.columns_4 + desc.columns_3 + desc.columns_2;
  blocks[0] = desc.columns_4 / kBlock;
  blocks[1] = desc.columns_3 / kBlock;
  blocks[2] = desc.columns_2 / kBlock;
  outliers = desc.outlier_index.shape[0];
  codes = desc.codes.data;
  codebook = desc.codebook.data;
  scale = desc.scale.data;
  row_scale = desc.row_scale.data;
  order = desc.order.data;
  outlier_ptr = desc.outlier_ptr.data;
  outlier_index = desc.outlier_index.data;
  outlier_value = desc.outlier_value.data;
  bias = desc.bias.shape[0] ? desc.bias.data : nullptr;
  if (bias && desc.bias.dtype != dtype) throw InvalidLayer("bias: on a GPU its type must be that of x");

  const bool identity = desc.order.shape[0] == 0;
  const bool wide_order = identity ? in_features > 65535 : desc.order.dtype != CLAQ_UINT16;
  const bool wide_index = outliers && desc.outlier_index.dtype != CLAQ_UINT16;
  const bool wide = wide_order || wide_index;
  index = wide ? "i32" : "u16";
  if (identity) {
    std::vector<unsigned char> features(static_cast<size_t>(columns) * (wide ? 4 : 2));
    for (int64_t p = 0; p < columns; ++p) {
      const auto feature = static_cast<int32_t>(std::min(p, in_features));
      std::memcpy(&features[static_cast<size_t>(p) * (wide ? 4 : 2)], &feature, wide ? 4 : 2);
    }
    order = upload(features.data(), features.size(), allocate);
  } else if (wide && !wide_order) {
    order = widened(desc.order, allocate);
  }
  if (wide && outliers && !wide_index) outlier_index = widened(desc.outlier_index, allocate);

  for (const auto& [name, pointer] : {std::pair{"codes", codes}, {"codebook", codebook}, {"scale", scale}, {"row_scale", row_scale},
                                      {"order", order}, {"bias", bias}, {"outlier_ptr", outlier_ptr},
                                      {"outlier_index", outlier_index}, {"outlier_value", outlier_value}}) {
    if (!is_aligned(pointer)) throw InvalidLayer(std::string(name) + ": its memory is not aligned to 16 bytes");
  }
}

}  // namespace claq::cuda
