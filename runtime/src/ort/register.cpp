// The library's entry point for ONNX Runtime.
#include <algorithm>
#include <string>

#include "../cuda/status.h"
#include "operator.h"

namespace claq::ort {
namespace {

bool has_cuda_provider(const Api& api) {
  char** names = nullptr;
  int count = 0;
  check(api.providers(&names, &count));
  const bool found = std::any_of(names, names + count, [](const char* name) { return std::string(name) == "CUDAExecutionProvider"; });
  check(api.release_providers(names, count));
  return found;
}

}  // namespace
}  // namespace claq::ort

// Called by ONNX Runtime's SessionOptions.register_custom_ops_library.
extern "C" CLAQ_API OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  using namespace claq::ort;
  const OrtApi* table = base->GetApi(kOrtApiVersion);
  if (!table) {
    // Every version has the first slots, so the oldest table can carry the message.
    const OrtApi* oldest = base->GetApi(1);
    if (!oldest) return nullptr;
    const std::string message = std::string("libclaq needs ONNX Runtime 1.17 or newer, this is ") + base->GetVersionString();
    return Api(oldest).create_status(kFail, message.c_str());
  }
  const Api api(table);
  return guarded(api, [&] {
    OrtCustomOpDomain* domain = nullptr;
    check(api.create_domain("com.claq", &domain));  // must outlive every session, hence never released
    for (const TypedOp& op : cpu_ops()) check(api.add_op(domain, &op));
    // Where GPU, driver or kernels are missing the CPU operators serve sessions of the CUDA provider too. An ONNX Runtime without
    // that provider is not looked at further, which would start the driver: children that are forked later could not use it.
    std::string reason;
    if (base->GetApi(kOrtCudaApiVersion) && has_cuda_provider(api) && claq::cuda::usable(reason)) {
      for (const TypedOp& op : cuda_ops()) check(api.add_op(domain, &op));
    } else {
      // Attention has no kernel for GPUs here: ONNX Runtime's own, to which the file's function comes down, shall run there.
      for (const CustomOp* op : attention_ops()) check(api.add_op(domain, op));
    }
    check(api.add_domain(options, domain));
  });
}
