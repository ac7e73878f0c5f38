#include "layer.h"

#include <algorithm>
#include <cstring>

#include "dtype.h"
#include "family.h"
#include "half.h"
#include "pages.h"
#include "validate.h"

namespace claq {
namespace {

void build_segments(const claq_layer_desc& desc, LayerView& view) {
  const struct {
    int width;
    int64_t columns;
  } groups[3] = {{4, desc.columns_4}, {3, desc.columns_3}, {2, desc.columns_2}};
  int64_t block = 0, row = 0, offset = 0;
  for (const auto& group : groups) {
    if (group.columns == 0) continue;
    const int64_t blocks = group.columns / kBlock;
    view.segments[view.segment_count++] = {group.width, block, blocks, row, offset};
    block += blocks;
    row += blocks * group.width;
    offset += group.columns << group.width;
  }
  view.blocks = block;
}

// The same length as the codebook: columns in the order in which code words yield them, centroids offset to unsigned.
std::vector<uint8_t> build_table(const LayerView& view, const int8_t* codebook, int64_t size) {
  std::vector<uint8_t> table(static_cast<size_t>(size));
  for (int s = 0; s < view.segment_count; ++s) {
    const Segment& segment = view.segments[s];
    const int64_t entries = int64_t{1} << segment.width;
    for (int64_t b = 0; b < segment.blocks; ++b) {
      const int64_t base = segment.table_offset + b * kBlock * entries;
      for (int position = 0; position < kBlock; ++position) {
        const int64_t column = column_of_position(segment.width, position);
        for (int64_t e = 0; e < entries; ++e) {
          table[static_cast<size_t>(base + position * entries + e)] =
              static_cast<uint8_t>(codebook[base + column * entries + e] + 128);
        }
      }
    }
  }
  return table;
}

std::vector<float> to_float(const claq_tensor& tensor) {
  std::vector<float> values(static_cast<size_t>(tensor.shape[0]));
  for (size_t i = 0; i < values.size(); ++i) {
    switch (tensor.dtype) {
      case CLAQ_FLOAT16: values[i] = half_to_float(static_cast<const uint16_t*>(tensor.data)[i]); break;
      case CLAQ_BFLOAT16: values[i] = bfloat_to_float(static_cast<const uint16_t*>(tensor.data)[i]); break;
      default: values[i] = static_cast<const float*>(tensor.data)[i];
    }
  }
  return values;
}

// Puts a copy in the place of a tensor whose elements lie across their alignment, as tools other than ours may save them. What is not a
// tensor at all is left for validate() to refuse.
void align(claq_tensor& tensor, std::vector<std::unique_ptr<char[]>>& copies) {
  const size_t item = size_of(tensor.dtype);
  if (!tensor.data || !tensor.shape || reinterpret_cast<uintptr_t>(tensor.data) % item == 0) return;
  size_t bytes = item;
  for (int32_t i = 0; i < tensor.rank; ++i) {
    if (tensor.shape[i] < 0 || __builtin_mul_overflow(bytes, static_cast<size_t>(tensor.shape[i]), &bytes)) return;
  }
  copies.emplace_back(new char[bytes]);  // aligned for every element
  std::memcpy(copies.back().get(), tensor.data, bytes);
  tensor.data = copies.back().get();
}

// Of a vector that was copied and is hardly read again: a mapped file's pages need not stay in memory.
void release_copied(const claq_tensor& vector) {
  release_mapped_pages(vector.data, static_cast<size_t>(vector.shape[0]) * size_of(vector.dtype));
}

}  // namespace

std::unique_ptr<claq_layer> make_layer(const claq_layer_desc& given, LayerUse use) {
  auto layer = std::make_unique<claq_layer>();
  claq_layer_desc desc = given;
  for (claq_tensor* tensor : {&desc.codes, &desc.codebook, &desc.scale, &desc.row_scale, &desc.order, &desc.outlier_ptr, &desc.outlier_index,
                              &desc.outlier_value, &desc.bias}) {
    align(*tensor, layer->aligned);
  }
  validate(desc);
  layer->family = &choose_family(desc.kernel);
  LayerView& view = layer->view;
  view.tuning = choose_tuning();
  view.in_features = desc.in_features;
  view.out_features = desc.out_features;
  view.columns = desc.columns_4 + desc.columns_3 + desc.columns_2;
  build_segments(desc, view);
  view.codes = static_cast<const uint32_t*>(desc.codes.data);

  layer->table = build_table(view, static_cast<const int8_t*>(desc.codebook.data), desc.codebook.shape[0]);
  view.table = layer->table.data();
  release_copied(desc.codebook);
  view.lowest_centroid = std::find(layer->table.begin(), layer->table.end(), 0) != layer->table.end();
  layer->scale = to_float(desc.scale);
  view.scale = layer->scale.data();
  layer->row_scale = to_float(desc.row_scale);
  view.row_scale = layer->row_scale.data();

  layer->gather.resize(static_cast<size_t>(view.columns));
  const bool ordered = desc.order.shape[0] != 0;
  view.identity_order = true;
  for (int64_t p = 0; p < view.columns; ++p) {
    int64_t feature = p;
    if (ordered) {
      feature = desc.order.dtype == CLAQ_UINT16 ? static_cast<const uint16_t*>(desc.order.data)[p]
                                                : static_cast<const int32_t*>(desc.order.data)[p];
    }
    const bool padding = feature >= view.in_features;
    if (padding ? p < view.in_features : feature != p) view.identity_order = false;
    layer->gather[static_cast<size_t>(p)] = padding ? -1 : static_cast<int32_t>(feature);
  }
  view.gather = layer->gather.data();

  if (desc.outlier_ptr.shape[0] != 0 && desc.outlier_index.shape[0] != 0) {
    view.outlier_ptr = static_cast<const int32_t*>(desc.outlier_ptr.data);
    view.outlier_index = desc.outlier_index.data;
    view.wide_outlier_index = desc.outlier_index.dtype == CLAQ_INT32;
    view.outlier_value = static_cast<const uint16_t*>(desc.outlier_value.data);
    if (use == LayerUse::kAny && layer->family->outlier_slices) {
      view.outlier_slices = layer->sliced.make(view);
      release_copied(desc.outlier_index);
      release_copied(desc.outlier_value);
    }
  }
  if (desc.bias.shape[0] != 0) {
    layer->bias = to_float(desc.bias);
    view.bias = layer->bias.data();
  }
  return layer;
}

}  // namespace claq
