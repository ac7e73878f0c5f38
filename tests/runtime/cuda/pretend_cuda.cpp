// libclaq's operators (CLAQ_LIBRARY) for an ONNX Runtime of which they are told that it has the CUDA provider.
#include <dlfcn.h>

#include <algorithm>
#include <cstdlib>

#include "../../../runtime/src/ort/api.h"

using namespace claq::ort;

namespace {

constexpr int kSlots = kKernelInfoGetAllocator + 1;
const OrtApiBase* real = nullptr;
const char* names[] = {"CUDAExecutionProvider", "CPUExecutionProvider"};

const OrtApi* table(uint32_t version) {
  static void* slots[kSlots];
  const OrtApi* whole = real->GetApi(version);
  if (!whole) return nullptr;
  std::copy_n(whole->slots, kSlots, slots);
  OrtStatus* (*const providers)(char***, int*) = [](char*** out, int* count) -> OrtStatus* {
    *out = const_cast<char**>(names);
    *count = 2;
    return nullptr;
  };
  OrtStatus* (*const release)(char**, int) = [](char**, int) -> OrtStatus* { return nullptr; };
  slots[kGetAvailableProviders] = reinterpret_cast<void*>(providers);
  slots[kReleaseAvailableProviders] = reinterpret_cast<void*>(release);
  return reinterpret_cast<const OrtApi*>(slots);
}

}  // namespace

extern "C" OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  using Register = OrtStatus* (*)(OrtSessionOptions*, const OrtApiBase*);
  real = base;
  static const OrtApiBase pretended{table, base->GetVersionString};
  void* library = dlopen(std::getenv("CLAQ_LIBRARY"), RTLD_NOW);
  return reinterpret_cast<Register>(dlsym(library, "RegisterCustomOps"))(options, &pretended);
}
