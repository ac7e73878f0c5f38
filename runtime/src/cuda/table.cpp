#include "table.h"

#include "../layer.h"
#include "../layout.h"
#include "launch.h"

namespace claq::cuda {

Table::Table(const Tensors& tensors) : tensors_(tensors) {
  Kernels& kernels = Kernels::current();
  const std::string name = "gather_" + tensors.type + "_" + tensors.index;
  by_int32_ = &kernels.get(name + "_i32");
  by_int64_ = &kernels.get(name + "_i64");
}

void Table::run(claq_dtype index_dtype, const void* indices, int64_t count, void* y, Stream stream) const {
  if (index_dtype != CLAQ_INT32 && index_dtype != CLAQ_INT64) throw InvalidArgument("indices: expected int32 or int64");
  if (count <= 0) return;
  if (!indices || !y) throw InvalidArgument("indices and y: expected data");
  const Kernel& kernel = index_dtype == CLAQ_INT32 ? *by_int32_ : *by_int64_;
  Launch(kernel, stream)
      .pointer(indices)
      .pointer(tensors_.codes)
      .pointer(tensors_.codebook)
      .pointer(tensors_.scale)
      .pointer(tensors_.row_scale)
      .pointer(tensors_.order)
      .pointer(tensors_.outlier_ptr)
      .pointer(tensors_.outlier_index)
      .pointer(tensors_.outlier_value)
      .pointer(y)
      .integer(tensors_.out_features)
      .integer(tensors_.in_features)
      .integer(tensors_.columns)
      .integer(tensors_.blocks[0])
      .integer(tensors_.blocks[1])
      .integer(tensors_.outliers)
      .over(count, divide_up(tensors_.columns, kBlock * int64_t{kernel.record->tile[2]}));
}

}  // namespace claq::cuda
