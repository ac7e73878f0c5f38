#include "layer.h"

#include <algorithm>

#include "family.h"
#include "half.h"
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

}  // namespace

std::unique_ptr<claq_layer> make_layer(const claq_layer_desc& desc) {
  validate(desc);
  auto layer = std::make_unique<claq_layer>();
  layer->family = &choose_family(desc.kernel);
  LayerView& view = layer->view;
  view.in_features = desc.in_features;
  view.out_features = desc.out_features;
  view.columns = desc.columns_4 + desc.columns_3 + desc.columns_2;
  build_segments(desc, view);
  view.codes = static_cast<const uint32_t*>(desc.codes.data);

  layer->table = build_table(view, static_cast<const int8_t*>(desc.codebook.data), desc.codebook.shape[0]);
  view.table = layer->table.data();
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
    if (layer->family->outlier_slices) view.outlier_slices = layer->sliced.make(view);
    view.gathers = layer->family->gathers && layer->family->gathers();
  }
  if (desc.bias.shape[0] != 0) {
    layer->bias = to_float(desc.bias);
    view.bias = layer->bias.data();
  }
  return layer;
}

}  // namespace claq
