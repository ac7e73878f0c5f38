// An embedding in the memory of a GPU: the native twin of `embedding` in kernels/triton/launch.py.
#pragma once

#include <cstdint>

#include "package.h"
#include "tensors.h"

namespace claq::cuda {

class Table {
 public:
  // Throws Error if this device has no kernels for it.
  explicit Table(const Tensors& tensors);

  // Queues y[count, in_features] = the rows that `indices` names (int32 or int64) on the stream and returns. An index below 0
  // counts from the end, one out of range gives a row of NaN: an error would have to wait for the GPU.
  void run(claq_dtype index_dtype, const void* indices, int64_t count, void* y, Stream stream) const;

  int64_t in_features() const { return tensors_.in_features; }

 private:
  Tensors tensors_;
  // Loaded when the table is made, so that a run takes no lock and can be captured in a CUDA graph.
  const Kernel* by_int32_;
  const Kernel* by_int64_;
};

}  // namespace claq::cuda
