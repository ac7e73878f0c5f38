// A quantized layer in the memory of a GPU, and y = x W^T + b on it: the native twin of kernels/triton/launch.py.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

#include "claq.h"
#include "driver.h"
#include "package.h"

namespace claq::cuda {

// Takes memory of the device for as long as the layer lives.
using Allocate = std::function<void*(size_t bytes)>;

class Layer {
 public:
  // `desc` describes the layer as for claq_create, but its data pointers are device memory, aligned to 16 bytes; the
  // memory is read in place. All parts but the codes are copied to the host once, to be checked, on the calling
  // thread's context. `dtype` is that of x and y. Throws InvalidLayer, or Error if this device cannot run it.
  Layer(const claq_layer_desc& desc, claq_dtype dtype, const Allocate& allocate);

  // Bytes of device memory that `run` needs for that many rows of x, aligned to 256 bytes.
  size_t workspace(int64_t rows, bool has_blas) const;

  // Queues y[rows, N] = x[rows, K] W^T + b on the stream and returns. `blas` is a cublasHandle_t on that stream, or null.
  void run(const void* x, int64_t rows, void* y, void* workspace, Stream stream, void* blas) const;

  int64_t in_features() const { return in_features_; }
  int64_t out_features() const { return out_features_; }

 private:
  enum class Path { kFew, kTens, kDense };
  struct Plan;

  Plan plan(int64_t rows, bool has_blas) const;
  const Kernel* tensor_core_kernel(int64_t rows) const;
  int64_t splits(const Kernel& kernel, int64_t tiles) const;
  void few(const Plan& plan, const void* x, void* y, char* memory, Stream stream) const;
  void tens(const Plan& plan, const void* x, void* y, char* memory, Stream stream) const;
  void dense(const Plan& plan, const void* x, void* y, char* memory, Stream stream, void* blas) const;
  void finish(const Kernel& kernel, const void* part, const void* scales, const void* gathered, void* y, int64_t rows, int64_t splits,
              Stream stream) const;

  claq_dtype dtype_;
  int64_t in_features_, out_features_, columns_;
  int64_t blocks_[3];  // of 32 columns, by width 4, 3, 2
  bool outliers_;
  const void *codes_, *codebook_, *scale_, *row_scale_, *order_, *outlier_ptr_, *outlier_index_, *outlier_value_, *bias_;
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
