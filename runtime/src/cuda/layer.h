// A quantized layer in the memory of a GPU, and y = x W^T + b on it: the native twin of kernels/triton/launch.py.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "blas.h"
#include "driver.h"
#include "package.h"
#include "tensors.h"

namespace claq::cuda {

class Launch;

class Layer {
 public:
  // Throws Error if this device cannot run it.
  Layer(const Tensors& tensors, const Allocate& allocate);

  // Bytes of device memory that `run` needs for that many rows of x, aligned to 256 bytes. `has_blas`: it gets a handle.
  size_t workspace(int64_t rows, bool has_blas) const;

  // Queues y[rows, N] = x[rows, K] W^T + b on the stream and returns. `blas` is a cublasHandle_t on that stream, or null.
  void run(const void* x, int64_t rows, void* y, void* workspace, Stream stream, void* blas) const;

  const Tensors& tensors() const { return tensors_; }

 private:
  enum class Path { kFew, kTens, kDense };
  struct Plan;

  Plan plan(int64_t rows, bool has_blas) const;
  const Kernel* tensor_core_kernel(int64_t rows) const;
  int64_t splits(const Kernel& kernel, int64_t tiles) const;
  void few(const Plan& plan, const void* x, void* y, char* memory, Stream stream) const;
  void tens(const Plan& plan, const void* x, void* y, char* memory, Stream stream) const;
  void dense(const Plan& plan, const void* x, void* y, char* memory, Stream stream, void* blas) const;
  // What scales the activations, and quantizes them for few rows, for the caller to say over how many programs.
  Launch prepare(const Kernel& kernel, const Plan& plan, const void* x, int64_t rows, char* memory, Stream stream) const;
  void finish(const Kernel& kernel, const void* part, const void* scales, const void* gathered, void* y, int64_t rows, int64_t splits,
              Stream stream) const;

  Tensors tensors_;
  Blas blas_;
  int multiprocessors_;

  // Loaded when the layer is made, so that a run takes no lock and can be captured in a CUDA graph.
  const Kernel* quantize_;
  std::vector<const Kernel*> gemv_;  // by rows, from 1
  const Kernel* finish_one_;
  const Kernel* finish_four_;
  // Only for float16 and bfloat16.
  const Kernel* scale_activations_;
  std::vector<const Kernel*> gemm_;  // by ascending most_vectors
  const Kernel* finish_scaled_;
  // Only where out_features is a multiple of four.
  const Kernel* dequantize_[3];
  const Kernel* add_outliers_;
  const Kernel* set_bias_;
};

}  // namespace claq::cuda
