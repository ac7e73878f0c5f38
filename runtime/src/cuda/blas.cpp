#include "blas.h"

#include <dlfcn.h>
#ifdef __linux__
#include <link.h>
#endif

#include <cstring>
#include <set>
#include <string>
#include <vector>

#include "driver.h"

namespace claq::cuda {
namespace {

using GemmEx = int (*)(void*, int, int, int, int, int, const void*, const void*, int, int, const void*, int, int, const void*, void*, int,
                       int, int, int);

char several;  // its address stands for a function that cannot be told

// Paths of the libraries in this process whose file name starts so.
std::vector<std::string> loaded(const char* prefix) {
  std::vector<std::string> found;
#ifdef __linux__
  struct Search {
    const char* prefix;
    std::vector<std::string>* found;
  } search{prefix, &found};
  const auto look = [](dl_phdr_info* library, size_t, void* data) {
    const auto& wanted = *static_cast<const Search*>(data);
    const char* slash = std::strrchr(library->dlpi_name, '/');
    const char* name = slash ? slash + 1 : library->dlpi_name;
    if (std::strncmp(name, wanted.prefix, std::strlen(wanted.prefix)) == 0) wanted.found->push_back(library->dlpi_name);
    return 0;
  };
  dl_iterate_phdr(look, &search);
#else
  (void)prefix;  // CUDA is on no other system that this is built for
#endif
  return found;
}

// Each cublasGemmEx that the libraries or what they depend on have.
std::set<void*> functions_of(const std::vector<std::string>& libraries) {
  std::set<void*> found;
  for (const std::string& path : libraries) {
    void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_NOLOAD);
    if (!library) continue;
    // It stays open: a layer may call it as long as there is one.
    if (void* function = dlsym(library, "cublasGemmEx")) {
      found.insert(function);
    } else {
      dlclose(library);
    }
  }
  return found;
}

// ONNX Runtime's handle is of the library that its CUDA provider depends on. Without the provider it is of the only one there is.
void* find() {
  std::set<void*> found = functions_of(loaded("libonnxruntime_providers_cuda."));
  if (found.empty()) found = functions_of(loaded("libcublas."));
  if (found.empty()) return nullptr;
  return found.size() == 1 ? *found.begin() : &several;
}

}  // namespace

Blas::State Blas::state() const {
  void* known = gemm_.load(std::memory_order_acquire);
  if (!known) {
    void* found = find();
    if (!found) return State::kNotLoaded;
    if (gemm_.compare_exchange_strong(known, found, std::memory_order_acq_rel)) known = found;
  }
  return known == &several ? State::kUnknown : State::kFound;
}

void Blas::multiply_add(void* handle, Number type, const void* x, const void* w, void* y, int m, int n, int k, int stride) const {
  constexpr int kNoTranspose = 0, kComputeFloat32 = 68, kComputeFloat32Pedantic = 69, kDefaultAlgorithm = -1;
  const float one = 1;
  const int number = static_cast<int>(type);
  // Where the handle's math mode allows it, the plain type rounds float32 factors to TF32. Factors of 16 bits lose nothing by it.
  const int compute = type == Number::kFloat32 ? kComputeFloat32Pedantic : kComputeFloat32;
  const auto gemm = reinterpret_cast<GemmEx>(gemm_.load(std::memory_order_acquire));
  // cuBLAS counts by columns, where these row-major matrices are their transposes: y' += w' x'.
  const int status = gemm(handle, kNoTranspose, kNoTranspose, n, m, k, &one, w, number, n, x, number, k, &one, y, number, stride,
                          compute, kDefaultAlgorithm);
  if (status != 0) throw Error("cublasGemmEx failed with status " + std::to_string(status));
}

}  // namespace claq::cuda
