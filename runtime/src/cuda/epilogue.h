// What the fused operators do with the product of a layer in the memory of a GPU; the native twin of kernels/triton/fused.py.
#pragma once

#include <cstdint>

#include "driver.h"
#include "package.h"
#include "tensors.h"

namespace claq::cuda {

// Kernels are loaded when one is made, so that a call takes no lock and can be captured in a CUDA graph. The constructors throw
// Error if this device's package lacks the kernel; calls only queue.
class Add {
 public:
  explicit Add(const Tensors& tensors);
  // y[count] += residual[count].
  void run(const void* residual, void* y, int64_t count, Stream stream) const;

 private:
  const Kernel* kernel_;
  int64_t item_;
};

class AddNorm {
 public:
  AddNorm(const Tensors& tensors, float epsilon);
  // y[rows, width] += residual, and normalized = y / sqrt(mean(y^2) + epsilon) * weight[width] of each row.
  void run(const void* residual, const void* weight, void* y, void* normalized, int64_t rows, int64_t width, Stream stream) const;

 private:
  const Kernel* kernel_;
  int32_t epsilon_bits_;  // as the kernel takes it: launches have pointers and integers
};

class SwiGlu {
 public:
  explicit SwiGlu(const Tensors& tensors);
  // y[rows, half] = silu(product[rows, :half]) * product[rows, half:].
  void run(const void* product, int64_t rows, int64_t half, void* y, Stream stream) const;

 private:
  const Kernel* kernel_;
};

class Take {
 public:
  explicit Take(const Tensors& tensors);
  // y[rows, columns] = product[rows, first : first + columns], of `width` columns.
  void run(const void* product, int64_t rows, int64_t width, int64_t first, int64_t columns, void* y, Stream stream) const;

 private:
  const Kernel* kernel_;
};

class Turn {
 public:
  explicit Turn(const Tensors& tensors);
  // The same of heads of `head` values, turned by cos and sin [rows, half]: value i of a head together with value i + half.
  void run(const void* product, int64_t rows, int64_t width, int64_t first, int64_t columns, const void* cos, const void* sin,
           int64_t head, int64_t half, void* y, Stream stream) const;

 private:
  const Kernel* kernel_;
};

}  // namespace claq::cuda
