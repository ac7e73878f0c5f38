// The CUDA driver and cuBLAS, looked up at run time: libclaq links to nothing of CUDA and loads where there is none.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>

namespace claq::cuda {

using Context = void*;   // CUcontext
using Module = void*;    // CUmodule
using Function = void*;  // CUfunction
using Stream = void*;    // CUstream, the same as cudaStream_t
using Address = uint64_t;  // CUdeviceptr

// What the driver refused or what is missing, in words.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

class Driver {
 public:
  // The driver of this machine, initialised. Throws Error with the reason where there is none.
  // Whether the driver's library is there; it is not started by that.
  static bool present();
  static const Driver& get();

  int device_count() const;
  // 80 for compute capability 8.0.
  int capability(int device) const;
  int multiprocessors(int device) const;

  // The calling thread's context. Throws Error if it has none.
  Context current() const;
  int current_device() const;

  Module load(const void* image) const;
  void unload(Module module) const noexcept;
  // Throws Error if the device cannot give a block `shared` bytes.
  Function function(Module module, const char* entry, unsigned shared) const;

  void to_host(void* host, const void* device, size_t bytes) const;
  void to_device(void* device, const void* host, size_t bytes) const;
  void copy(void* to, const void* from, size_t bytes, Stream stream) const;  // on the device, asynchronous
  void* allocate(size_t bytes) const;
  void release(void* memory) const noexcept;

  void launch(Function function, const unsigned (&grid)[3], unsigned threads, unsigned shared, Stream stream, void** parameters) const;

 private:
  Driver();
  void check(int result, const char* call) const;

  int (*init_)(unsigned);
  int (*count_)(int*);
  int (*device_)(int*, int);
  int (*attribute_)(int*, int, int);
  int (*current_)(Context*);
  int (*context_device_)(int*);
  int (*load_)(Module*, const void*);
  int (*unload_)(Module);
  int (*get_function_)(Function*, Module, const char*);
  int (*set_attribute_)(Function, int, int);
  int (*to_host_)(void*, Address, size_t);
  int (*to_device_)(Address, const void*, size_t);
  int (*synchronize_)(Stream);
  int (*copy_)(Address, Address, size_t, Stream);
  int (*allocate_)(Address*, size_t);
  int (*release_)(Address);
  int (*launch_)(Function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, Stream, void**, void**);
  int (*error_text_)(int, const char**);
};

enum class Number : int { kFloat32 = 0, kFloat16 = 2, kBfloat16 = 14 };  // cudaDataType

// cublasGemmEx of the cuBLAS that the host program has loaded; null while it has not. To be asked for only by who has a handle.
// Row-major y[m, n] (rows `stride` apart) += x[m, k] w[k, n], sums in float32.
class Blas {
 public:
  static const Blas* get();
  void multiply_add(void* handle, Number type, const void* x, const void* w, void* y, int m, int n, int k, int stride) const;

 private:
  using GemmEx = int (*)(void*, int, int, int, int, int, const void*, const void*, int, int, const void*, int, int, const void*, void*,
                         int, int, int, int);
  explicit Blas(GemmEx gemm) : gemm_(gemm) {}
  GemmEx gemm_;
};

}  // namespace claq::cuda
