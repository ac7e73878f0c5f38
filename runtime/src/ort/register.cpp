// The library's entry point for ONNX Runtime.
#include <algorithm>
#include <atomic>
#include <cstdio>
#include <memory>
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

// Whether it has that version of the interface, which is its own second number: ONNX Runtime prints an error where one is asked for
// that it lacks, so its number is looked at first.
bool has_version(const OrtApiBase* base, uint32_t version) {
  unsigned first = 0, second = 0;
  const bool read = std::sscanf(base->GetVersionString(), "%u.%u", &first, &second) == 2;
  return !(read && first == 1 && second < version) && base->GetApi(version);
}

// A process's operators, with or without GPUs, are made once for each ONNX Runtime in it, whose tables differ. They must outlive every
// session, hence are never released. The list only grows, by atomic exchanges: a child forked in the middle waits for no lock.
struct Made {
  const OrtApi* table;
  bool gpus;
  OrtCustomOpDomain* domain;
  const Made* next;
};
std::atomic<const Made*> last_made{nullptr};

const Made* find_made(const Made* first, const OrtApi* table, bool gpus) {
  while (first && (first->table != table || first->gpus != gpus)) first = first->next;
  return first;
}

OrtCustomOpDomain* make_domain(const OrtApi* table, bool gpus) {
  const Api api(table);
  OrtCustomOpDomain* domain = nullptr;
  check(api.create_domain("com.claq", &domain));
  for (const TypedOp& op : cpu_ops()) check(api.add_op(domain, &op));
  if (gpus) {
    for (const TypedOp& op : cuda_ops()) check(api.add_op(domain, &op));
  } else {
    // Attention has no kernel for GPUs here: ONNX Runtime's own, to which the file's function comes down, shall run there.
    for (const CustomOp* op : attention_ops()) check(api.add_op(domain, op));
  }
  return domain;
}

OrtCustomOpDomain* domain_of(const OrtApi* table, bool gpus) {
  const Made* first = last_made.load(std::memory_order_acquire);
  if (const Made* made = find_made(first, table, gpus)) return made->domain;
  auto own = std::make_unique<Made>(Made{table, gpus, make_domain(table, gpus), first});
  while (!last_made.compare_exchange_weak(own->next, own.get(), std::memory_order_acq_rel, std::memory_order_acquire)) {
    // Of two threads that are the first the later one's domain stays unused.
    if (const Made* made = find_made(own->next, table, gpus)) return made->domain;
  }
  return own.release()->domain;
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
    // Where GPU, driver or kernels are missing the CPU operators serve sessions of the CUDA provider too. An ONNX Runtime without
    // that provider is not looked at further, which would start the driver: children that are forked later could not use it.
    std::string reason;
    const bool gpus = has_version(base, kOrtCudaApiVersion) && has_cuda_provider(api) && claq::cuda::usable(reason);
    check(api.add_domain(options, domain_of(table, gpus)));
  });
}
