// cuBLAS as the host program has loaded it: libclaq links to nothing of CUDA.
#pragma once

#include <atomic>

namespace claq::cuda {

enum class Number : int { kFloat32 = 0, kFloat16 = 2, kBfloat16 = 14 };  // cudaDataType

// The cuBLAS that the host's handle is of: a handle must meet the functions of its own library. To be asked for only by who has
// a handle. Looked for until one is loaded; what is found then stays, so that a run finds what its workspace was sized for.
class Blas {
 public:
  enum class State {
    kNotLoaded,  // yet
    kUnknown,    // several are loaded, and the handle may be of any: none is used
    kFound,
  };
  State state() const;

  // Row-major y[m, n] (rows `stride` apart) += x[m, k] w[k, n], sums in float32. Throws Error; only where the state is kFound.
  void multiply_add(void* handle, Number type, const void* x, const void* w, void* y, int m, int n, int k, int stride) const;

 private:
  mutable std::atomic<void*> gemm_{nullptr};  // cublasGemmEx; null while none is loaded
};

}  // namespace claq::cuda
