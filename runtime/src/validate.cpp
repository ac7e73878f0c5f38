#include "validate.h"

#include <algorithm>
#include <cinttypes>
#include <cstdarg>
#include <cstdio>
#include <string>
#include <vector>

#include "half.h"
#include "layer.h"

namespace claq {
namespace {

// Far above any real layer and small enough that no product below overflows 64 bits.
constexpr int64_t kLargestDimension = int64_t{1} << 30;

// Kernels look at a few entries at a time, whose numbers must not overflow 32 bits behind the last one.
constexpr int64_t kMostOutliers = INT32_MAX - 1024;

[[noreturn]] __attribute__((format(printf, 1, 2))) void refuse(const char* format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  throw InvalidLayer(text);
}

const char* dtype_name(int32_t dtype) {
  switch (dtype) {
    case CLAQ_FLOAT32: return "float32";
    case CLAQ_INT8: return "int8";
    case CLAQ_UINT16: return "uint16";
    case CLAQ_INT32: return "int32";
    case CLAQ_FLOAT16: return "float16";
    case CLAQ_UINT32: return "uint32";
    case CLAQ_BFLOAT16: return "bfloat16";
    default: return "another type";
  }
}

std::string shape_text(const claq_tensor& tensor) {
  std::string text = "[";
  for (int32_t i = 0; i < tensor.rank; ++i) text += (i ? ", " : "") + std::to_string(tensor.shape[i]);
  return text + "]";
}

int64_t length(const claq_tensor& tensor) { return tensor.shape[0]; }

void check_dtype(const char* name, const claq_tensor& tensor, int32_t expected) {
  if (tensor.dtype != expected) refuse("%s: is %s, expected %s", name, dtype_name(tensor.dtype), dtype_name(expected));
}

void check_shape(const char* name, const claq_tensor& tensor, const std::vector<int64_t>& expected) {
  if (tensor.rank < 0 || (tensor.rank > 0 && !tensor.shape)) refuse("%s: has no shape", name);
  bool same = tensor.rank == static_cast<int32_t>(expected.size());
  int64_t elements = 1;
  for (size_t i = 0; same && i < expected.size(); ++i) {
    same = tensor.shape[i] == expected[i];
    elements *= expected[i];
  }
  if (!same) {
    std::string wanted;
    for (size_t i = 0; i < expected.size(); ++i) wanted += (i ? ", " : "") + std::to_string(expected[i]);
    refuse("%s: shape is %s, expected [%s]", name, shape_text(tensor).c_str(), wanted.c_str());
  }
  if (elements > 0 && !tensor.data) refuse("%s: has no data", name);
}

bool is_absent(const char* name, const claq_tensor& tensor) {
  if (tensor.rank != 1 || !tensor.shape) {
    refuse("%s: expected one dimension, got %" PRId32, name, tensor.rank);
  }
  return tensor.shape[0] == 0;
}

// Whether check_finite finds nothing: without a branch for each value, for compilers to make vectors of.
bool all_finite(const uint16_t* values, int64_t count, bool non_negative) {
  constexpr uint16_t kInfinity = 0x7c00, kSign = 0x8000;
  const uint16_t most = non_negative ? kSign : UINT16_MAX;
  uint16_t bad = 0;
  for (int64_t i = 0; i < count; ++i) {
    const bool infinite = (values[i] & kInfinity) == kInfinity;
    bad = static_cast<uint16_t>(bad | infinite | (values[i] > most));
  }
  return bad == 0;
}

void check_finite(const char* name, const claq_tensor& tensor, bool non_negative) {
  const auto* values = static_cast<const uint16_t*>(tensor.data);
  if (all_finite(values, length(tensor), non_negative)) return;
  for (int64_t i = 0; i < length(tensor); ++i) {
    const float value = half_to_float(values[i]);
    if (!half_is_finite(values[i]) || (non_negative && value < 0)) {
      refuse("%s: element %" PRId64 " is %g, expected a finite value%s", name, i, static_cast<double>(value),
             non_negative ? " >= 0" : "");
    }
  }
}

int64_t read_index(const claq_tensor& tensor, int64_t i) {
  return tensor.dtype == CLAQ_UINT16 ? static_cast<const uint16_t*>(tensor.data)[i]
                                     : static_cast<const int32_t*>(tensor.data)[i];
}

void check_attributes(const claq_layer_desc& desc) {
  const struct {
    const char* name;
    int64_t value;
    int64_t smallest;
  } attributes[] = {{"in_features", desc.in_features, 1},
                    {"out_features", desc.out_features, 1},
                    {"columns_4", desc.columns_4, 0},
                    {"columns_3", desc.columns_3, 0},
                    {"columns_2", desc.columns_2, 0}};
  for (const auto& attribute : attributes) {
    if (attribute.value < attribute.smallest || attribute.value > kLargestDimension) {
      refuse("%s: is %" PRId64 ", expected %" PRId64 " to %" PRId64, attribute.name, attribute.value, attribute.smallest,
             kLargestDimension);
    }
  }
  for (int i = 2; i < 5; ++i) {
    if (attributes[i].value % kBlock != 0) {
      refuse("%s: is %" PRId64 ", expected a multiple of %d", attributes[i].name, attributes[i].value, kBlock);
    }
  }
  const int64_t columns = desc.columns_4 + desc.columns_3 + desc.columns_2;
  if (columns < desc.in_features || columns > kLargestDimension) {
    refuse("columns_4 + columns_3 + columns_2: is %" PRId64 ", expected in_features = %" PRId64 " to %" PRId64, columns,
           desc.in_features, kLargestDimension);
  }
}

// Returns, for each stored column, whether it is padding.
std::vector<bool> check_order(const claq_layer_desc& desc, int64_t columns) {
  const int64_t features = desc.in_features;
  std::vector<bool> padding(static_cast<size_t>(columns), false);
  if (is_absent("order", desc.order)) {
    if (desc.order.dtype != CLAQ_UINT16 && desc.order.dtype != CLAQ_INT32) {
      refuse("order: is %s, expected uint16 or int32", dtype_name(desc.order.dtype));
    }
    for (int64_t p = features; p < columns; ++p) padding[static_cast<size_t>(p)] = true;
    return padding;
  }
  check_dtype("order", desc.order, features <= 65535 ? CLAQ_UINT16 : CLAQ_INT32);
  check_shape("order", desc.order, {columns});
  std::vector<bool> seen(static_cast<size_t>(features), false);
  int64_t found = 0;
  for (int64_t p = 0; p < columns; ++p) {
    const int64_t feature = read_index(desc.order, p);
    if (feature < 0 || feature > features) {
      refuse("order: element %" PRId64 " is %" PRId64 ", expected 0 to %" PRId64 " (the last means padding)", p, feature,
             features);
    }
    if (feature == features) {
      padding[static_cast<size_t>(p)] = true;
      continue;
    }
    if (seen[static_cast<size_t>(feature)]) {
      refuse("order: element %" PRId64 " is %" PRId64 ", which occurs before; expected every feature exactly once", p, feature);
    }
    seen[static_cast<size_t>(feature)] = true;
    ++found;
  }
  if (found != features) {
    refuse("order: holds %" PRId64 " of the %" PRId64 " input features, expected every feature exactly once", found, features);
  }
  return padding;
}

// Whether check_columns finds nothing, in vectors like all_finite: columns ascend within a row if they descend nowhere but between rows,
// and then a row's first and last tell whether all of its columns exist.
template <class Index>
bool columns_hold(const Index* index, const int32_t* ptr, int64_t rows, int64_t columns, const std::vector<bool>& padding) {
  int64_t between = 0, descents = 0;
  for (int64_t n = 0; n < rows; ++n) {
    if (ptr[n] == ptr[n + 1]) continue;
    if (index[ptr[n]] < 0 || index[ptr[n + 1] - 1] >= columns) return false;
    if (ptr[n] > 0) between += index[ptr[n]] <= index[ptr[n] - 1];
  }
  constexpr int64_t kTogether = 4096;  // counted in 16 bits, which more of fit into a vector
  for (int64_t first = 1, count = ptr[rows]; first < count; first += kTogether) {
    const int64_t end = std::min(first + kTogether, count);
    uint16_t some = 0;
    for (int64_t i = first; i < end; ++i) some = static_cast<uint16_t>(some + (index[i] <= index[i - 1]));
    descents += some;
  }
  if (descents != between) return false;
  if (std::find(padding.begin(), padding.end(), true) == padding.end()) return true;
  return std::none_of(index, index + ptr[rows], [&](Index column) { return padding[static_cast<size_t>(column)]; });
}

// Refuses the first column that is not as it should be.
void check_columns(const claq_tensor& index, const int32_t* ptr, int64_t rows, int64_t columns, const std::vector<bool>& padding) {
  const bool hold = index.dtype == CLAQ_UINT16 ? columns_hold(static_cast<const uint16_t*>(index.data), ptr, rows, columns, padding)
                                               : columns_hold(static_cast<const int32_t*>(index.data), ptr, rows, columns, padding);
  if (hold) return;
  for (int64_t n = 0; n < rows; ++n) {
    int64_t previous = -1;
    for (int64_t i = ptr[n]; i < ptr[n + 1]; ++i) {
      const int64_t column = read_index(index, i);
      if (column < 0 || column >= columns) {
        refuse("outlier_index: element %" PRId64 " is %" PRId64 ", expected a stored column, 0 to %" PRId64, i, column,
               columns - 1);
      }
      if (column <= previous) {
        refuse("outlier_index: element %" PRId64 " is %" PRId64 " after %" PRId64
               ", expected strictly ascending columns within output row %" PRId64,
               i, column, previous, n);
      }
      if (padding[static_cast<size_t>(column)]) {
        refuse("outlier_index: element %" PRId64 " is %" PRId64 ", a padding column; expected a column of an input feature", i,
               column);
      }
      previous = column;
    }
  }
}

void check_outliers(const claq_layer_desc& desc, int64_t columns, const std::vector<bool>& padding) {
  const bool absent = is_absent("outlier_ptr", desc.outlier_ptr);
  check_dtype("outlier_ptr", desc.outlier_ptr, CLAQ_INT32);
  check_dtype("outlier_value", desc.outlier_value, CLAQ_FLOAT16);
  if (absent) {
    if (!is_absent("outlier_index", desc.outlier_index)) {
      refuse("outlier_index: has %" PRId64 " elements, expected 0 because outlier_ptr is empty", length(desc.outlier_index));
    }
    if (!is_absent("outlier_value", desc.outlier_value)) {
      refuse("outlier_value: has %" PRId64 " elements, expected 0 because outlier_ptr is empty", length(desc.outlier_value));
    }
    if (desc.outlier_index.dtype != CLAQ_UINT16 && desc.outlier_index.dtype != CLAQ_INT32) {
      refuse("outlier_index: is %s, expected uint16 or int32", dtype_name(desc.outlier_index.dtype));
    }
    return;
  }
  const int64_t rows = desc.out_features;
  check_shape("outlier_ptr", desc.outlier_ptr, {rows + 1});
  const auto* ptr = static_cast<const int32_t*>(desc.outlier_ptr.data);
  if (ptr[0] != 0) refuse("outlier_ptr: element 0 is %" PRId32 ", expected 0", ptr[0]);
  // A weight has one outlier at most, so that a small layer cannot bring a large array.
  const int64_t count = ptr[rows], most = std::min(kMostOutliers, rows * desc.in_features);
  if (count > most) refuse("outlier_ptr: ends with %" PRId64 ", expected at most %" PRId64, count, most);
  for (int64_t n = 0; n < rows; ++n) {
    if (ptr[n + 1] < ptr[n]) {
      refuse("outlier_ptr: element %" PRId64 " is %" PRId32 ", expected at least the one before, %" PRId32, n + 1, ptr[n + 1],
             ptr[n]);
    }
  }
  if (count == 0) refuse("outlier_ptr: has %" PRId64 " elements, expected 0 because outlier_index is empty", rows + 1);
  check_dtype("outlier_index", desc.outlier_index, columns <= 65536 ? CLAQ_UINT16 : CLAQ_INT32);
  check_shape("outlier_index", desc.outlier_index, {count});
  check_shape("outlier_value", desc.outlier_value, {count});
  check_columns(desc.outlier_index, ptr, rows, columns, padding);
  check_finite("outlier_value", desc.outlier_value, false);
}

}  // namespace

void validate(const claq_layer_desc& desc) {
  check_attributes(desc);
  const int64_t columns = desc.columns_4 + desc.columns_3 + desc.columns_2;
  check_dtype("codes", desc.codes, CLAQ_UINT32);
  check_shape("codes", desc.codes,
              {(4 * desc.columns_4 + 3 * desc.columns_3 + 2 * desc.columns_2) / kBlock, desc.out_features});
  check_dtype("codebook", desc.codebook, CLAQ_INT8);
  check_shape("codebook", desc.codebook, {16 * desc.columns_4 + 8 * desc.columns_3 + 4 * desc.columns_2});
  check_dtype("scale", desc.scale, CLAQ_FLOAT16);
  check_shape("scale", desc.scale, {columns});
  check_finite("scale", desc.scale, true);
  check_dtype("row_scale", desc.row_scale, CLAQ_FLOAT16);
  check_shape("row_scale", desc.row_scale, {desc.out_features});
  check_finite("row_scale", desc.row_scale, false);

  const std::vector<bool> padding = check_order(desc, columns);
  const auto* scale = static_cast<const uint16_t*>(desc.scale.data);
  for (int64_t p = 0; p < columns; ++p) {
    if (padding[static_cast<size_t>(p)] && half_to_float(scale[p]) != 0) {
      refuse("scale: element %" PRId64 " is %g, expected 0 because the column is padding", p,
             static_cast<double>(half_to_float(scale[p])));
    }
  }
  check_outliers(desc, columns, padding);

  if (desc.bias.dtype != CLAQ_FLOAT32 && desc.bias.dtype != CLAQ_FLOAT16 && desc.bias.dtype != CLAQ_BFLOAT16) {
    refuse("bias: is %s, expected float32, float16 or bfloat16", dtype_name(desc.bias.dtype));
  }
  if (!is_absent("bias", desc.bias)) check_shape("bias", desc.bias, {desc.out_features});
}

}  // namespace claq
