// A stand-in for ONNX Runtime with its CUDA provider: as much of its C interface as libclaq's CUDA operators call, on host
// memory, which the fake driver takes for the device's.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "../../../runtime/src/ort/api.h"

using namespace claq::ort;

struct OrtStatus {
  std::string message;
};
struct OrtValue {
  void* data;
  int type;
  std::vector<int64_t> shape;
};
struct OrtTensorTypeAndShapeInfo {
  const OrtValue* value;
};
struct OrtKernelInfo {
  std::map<std::string, int64_t> attributes;
  std::vector<OrtValue> inputs;
};
struct OrtKernelContext {
  std::vector<OrtValue> inputs;
  std::vector<OrtValue> outputs;
  void* stream;
  void* cublas;
};
struct OrtCustomOpDomain {
  std::vector<const CustomOp*> ops;
};
struct OrtSessionOptions {
  OrtCustomOpDomain* domain;
};

namespace {

std::set<void*> held;  // what the allocator gave and was not given back

OrtAllocator allocator{
    1,
    [](OrtAllocator*, size_t bytes) {
      void* memory = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
      held.insert(memory);
      return memory;
    },
    [](OrtAllocator*, void* memory) {
      held.erase(memory);
      std::free(memory);
    },
    [](const OrtAllocator*) -> const OrtMemoryInfo* { return nullptr; },
};
int allocators_asked_for = 0;
int calls = 0;  // of what makes a node
int providers_given = 0;
const char* providers[] = {"CPUExecutionProvider", "CUDAExecutionProvider"};

template <class Signature>
void put(OrtApi* table, Slot slot, Signature* function) {
  table->slots[slot] = reinterpret_cast<void*>(function);
}

const OrtApi* table() {
  static auto* made = [] {
    auto* slots = static_cast<OrtApi*>(std::calloc(400, sizeof(void*)));
    put<OrtStatus*(int, const char*)>(slots, kCreateStatus, [](int, const char* text) { return new OrtStatus{text}; });
    put<const char*(const OrtStatus*)>(slots, kGetErrorMessage, [](const OrtStatus* status) { return status->message.c_str(); });
    put<void(OrtStatus*)>(slots, kReleaseStatus, [](OrtStatus* status) { delete status; });
    put<OrtStatus*(char***, int*)>(slots, kGetAvailableProviders, [](char*** names, int* count) -> OrtStatus* {
      *names = const_cast<char**>(providers);
      *count = 2;
      ++providers_given;
      return nullptr;
    });
    put<OrtStatus*(char**, int)>(slots, kReleaseAvailableProviders, [](char**, int) -> OrtStatus* {
      --providers_given;
      return nullptr;
    });
    put<OrtStatus*(const char*, OrtCustomOpDomain**)>(slots, kCreateCustomOpDomain, [](const char*, OrtCustomOpDomain** out) -> OrtStatus* {
      *out = new OrtCustomOpDomain;
      return nullptr;
    });
    put<OrtStatus*(OrtCustomOpDomain*, const CustomOp*)>(slots, kCustomOpDomainAdd,
                                                         [](OrtCustomOpDomain* domain, const CustomOp* op) -> OrtStatus* {
                                                           domain->ops.push_back(op);
                                                           return nullptr;
                                                         });
    put<OrtStatus*(OrtSessionOptions*, OrtCustomOpDomain*)>(slots, kAddCustomOpDomain,
                                                            [](OrtSessionOptions* options, OrtCustomOpDomain* domain) -> OrtStatus* {
                                                              options->domain = domain;
                                                              return nullptr;
                                                            });
    put<OrtStatus*(OrtValue*, void**)>(slots, kGetTensorMutableData, [](OrtValue* value, void** out) -> OrtStatus* {
      *out = value->data;
      return nullptr;
    });
    put<OrtStatus*(const OrtValue*, OrtTensorTypeAndShapeInfo**)>(
        slots, kGetTensorTypeAndShape, [](const OrtValue* value, OrtTensorTypeAndShapeInfo** out) -> OrtStatus* {
          *out = new OrtTensorTypeAndShapeInfo{value};
          return nullptr;
        });
    put<OrtStatus*(const OrtTensorTypeAndShapeInfo*, int*)>(slots, kGetTensorElementType,
                                                            [](const OrtTensorTypeAndShapeInfo* info, int* out) -> OrtStatus* {
                                                              *out = info->value->type;
                                                              return nullptr;
                                                            });
    put<OrtStatus*(const OrtTensorTypeAndShapeInfo*, size_t*)>(slots, kGetDimensionsCount,
                                                               [](const OrtTensorTypeAndShapeInfo* info, size_t* out) -> OrtStatus* {
                                                                 *out = info->value->shape.size();
                                                                 return nullptr;
                                                               });
    put<OrtStatus*(const OrtTensorTypeAndShapeInfo*, int64_t*, size_t)>(
        slots, kGetDimensions, [](const OrtTensorTypeAndShapeInfo* info, int64_t* out, size_t count) -> OrtStatus* {
          std::copy_n(info->value->shape.begin(), count, out);
          return nullptr;
        });
    put<void(OrtTensorTypeAndShapeInfo*)>(slots, kReleaseTensorTypeAndShapeInfo, [](OrtTensorTypeAndShapeInfo* info) { delete info; });
    put<OrtStatus*(const OrtKernelInfo*, const char*, int64_t*)>(
        slots, kKernelInfoGetAttributeInt64, [](const OrtKernelInfo* info, const char* name, int64_t* out) -> OrtStatus* {
          const auto found = info->attributes.find(name);
          if (found == info->attributes.end()) return new OrtStatus{"no such attribute"};
          *out = found->second;
          return nullptr;
        });
    put<OrtStatus*(const OrtKernelInfo*, const char*, float*)>(slots, kKernelInfoGetAttributeFloat,
                                                               [](const OrtKernelInfo*, const char*, float* out) -> OrtStatus* {
                                                                 *out = 1e-5f;
                                                                 return nullptr;
                                                               });
    put<OrtStatus*(const OrtKernelInfo*, char*, size_t*)>(slots, kKernelInfoGetNodeName,
                                                          [](const OrtKernelInfo*, char* out, size_t* size) -> OrtStatus* {
                                                            std::snprintf(out, *size, "the node");
                                                            return nullptr;
                                                          });
    put<OrtStatus*(const OrtKernelInfo*, size_t, int*, const OrtValue**)>(
        slots, kKernelInfoGetConstantInputTensor,
        [](const OrtKernelInfo* info, size_t index, int* is_constant, const OrtValue** out) -> OrtStatus* {
          *is_constant = index > 0;
          *out = index > 0 ? &info->inputs[index] : nullptr;
          return nullptr;
        });
    put<OrtStatus*(const OrtKernelContext*, size_t, const OrtValue**)>(
        slots, kKernelContextGetInput, [](const OrtKernelContext* context, size_t index, const OrtValue** out) -> OrtStatus* {
          *out = &context->inputs[index];
          return nullptr;
        });
    put<OrtStatus*(OrtKernelContext*, size_t, const int64_t*, size_t, OrtValue**)>(
        slots, kKernelContextGetOutput,
        [](OrtKernelContext* context, size_t index, const int64_t* shape, size_t rank, OrtValue** out) -> OrtStatus* {
          context->outputs[index].shape.assign(shape, shape + rank);
          *out = &context->outputs[index];
          return nullptr;
        });
    put<OrtStatus*(const OrtKernelContext*, void**)>(slots, kKernelContextGetGpuComputeStream,
                                                     [](const OrtKernelContext* context, void** out) -> OrtStatus* {
                                                       *out = context->stream;
                                                       return nullptr;
                                                     });
    put<OrtStatus*(const OrtKernelContext*, int, int, void**)>(
        slots, kKernelContextGetResource, [](const OrtKernelContext* context, int, int id, void** out) -> OrtStatus* {
          if (id != kCublasHandle || !context->cublas) return new OrtStatus{"no such resource"};
          *out = context->cublas;
          return nullptr;
        });
    put<OrtStatus*(const OrtKernelInfo*, int, OrtAllocator**)>(slots, kKernelInfoGetAllocator,
                                                               [](const OrtKernelInfo*, int, OrtAllocator** out) -> OrtStatus* {
                                                                 ++allocators_asked_for;
                                                                 ++calls;
                                                                 *out = &allocator;
                                                                 return nullptr;
                                                               });
    put<void(OrtAllocator*)>(slots, kReleaseAllocator, [](OrtAllocator*) { --allocators_asked_for; });
    put<OrtStatus*(const OrtKernelContext*, const OrtMemoryInfo*, size_t, void**)>(
        slots, kKernelContextGetScratchBuffer, [](const OrtKernelContext*, const OrtMemoryInfo*, size_t bytes, void** out) -> OrtStatus* {
          *out = allocator.Alloc(&allocator, bytes);
          return nullptr;
        });
    return slots;
  }();
  return made;
}

OrtSessionOptions options{nullptr};

}  // namespace

extern "C" {

struct FakeTensor {
  void* data;
  const int64_t* shape;
  int32_t rank;
  int32_t type;
};

// Calls RegisterCustomOps; returns how many operators the CUDA provider got, or -1.
int fake_ort_register(OrtStatus* (*register_ops)(OrtSessionOptions*, const OrtApiBase*)) {
  static const OrtApiBase base{[](uint32_t) { return table(); }, [] { return "fake"; }};
  if (register_ops(&options, &base) || providers_given != 0) return -1;
  int count = 0;
  for (const CustomOp* op : options.domain->ops) count += std::strcmp(op->GetExecutionProviderType(op), "CUDAExecutionProvider") == 0;
  return count;
}

// How often a node was made by this instance's table.
int fake_ort_calls() { return calls; }

// Makes, runs and destroys one node of the CUDA provider: its inputs, the attributes of a layer and of a split, the memory of
// each output. Returns 0, or 1 with a message: of the node, or what it failed to give back.
int fake_ort_run(const char* name, const int64_t* attributes, int inputs, const FakeTensor* tensors, void* const* y, void* stream,
                 void* cublas, char* error, size_t error_size) {
  static const char* kNames[] = {"in_features", "out_features", "columns_4", "columns_3", "columns_2", "split_0", "split_1", "split_2", "heads_0", "heads_1", "rotary_dim"};
  OrtKernelInfo info;
  for (size_t i = 0; i < std::size(kNames); ++i) info.attributes[kNames[i]] = attributes[i];
  for (int i = 0; i < inputs; ++i) {
    const FakeTensor& tensor = tensors[i];
    info.inputs.push_back({tensor.data, tensor.type, {tensor.shape, tensor.shape + tensor.rank}});
  }
  const CustomOp* found = nullptr;
  for (const CustomOp* op : options.domain->ops) {
    bool fits = std::strcmp(op->GetName(op), name) == 0 && std::strcmp(op->GetExecutionProviderType(op), "CUDAExecutionProvider") == 0;
    fits = fits && op->GetInputTypeCount(op) == info.inputs.size();
    for (size_t i = 0; fits && i < info.inputs.size(); ++i) fits = op->GetInputType(op, i) == info.inputs[i].type;
    if (fits) found = op;
  }
  const auto fail = [&](const std::string& text) {
    std::snprintf(error, error_size, "%s", text.c_str());
    return 1;
  };
  if (!found) return fail("no operator of these types");
  void* kernel = nullptr;
  if (OrtStatus* status = found->CreateKernelV2(found, table(), &info, &kernel)) {
    const std::string text = status->message;
    delete status;
    return fail(held.empty() && allocators_asked_for == 0 ? text : text + " (and memory is left)");
  }
  const size_t before = held.size();
  OrtKernelContext context{info.inputs, {}, stream, cublas};
  for (size_t i = 0; i < found->GetOutputTypeCount(found); ++i) context.outputs.push_back({y[i], found->GetOutputType(found, i), {}});
  OrtStatus* status = found->KernelComputeV2(kernel, &context);
  const std::string text = status ? status->message : "";
  delete status;
  if (held.size() != before) return fail("a run keeps scratch memory");
  found->KernelDestroy(kernel);
  if (!held.empty() || allocators_asked_for != 0) return fail("a destroyed node keeps memory or its allocator");
  return status ? fail(text) : 0;
}

}  // extern "C"
