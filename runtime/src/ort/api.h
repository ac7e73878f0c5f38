// The few parts of ONNX Runtime's stable C interface that the custom operator uses, declared from its public documentation
// so that no header of ONNX Runtime is needed.
//
// The interface is a table of function pointers that only ever grows at its end; `Slot` gives the positions used here.
// kOrtApiVersion is the lowest version whose table has all of them (KernelContext_ParallelFor came with 17).
#pragma once

#include <cstddef>
#include <cstdint>

struct OrtStatus;
struct OrtValue;
struct OrtSessionOptions;
struct OrtCustomOpDomain;
struct OrtKernelInfo;
struct OrtKernelContext;
struct OrtTensorTypeAndShapeInfo;
struct OrtShapeInferContext;
struct OrtMemoryInfo;

// The start of the structure, as it has been since the first version.
struct OrtAllocator {
  uint32_t version;
  void* (*Alloc)(OrtAllocator*, size_t);
  void (*Free)(OrtAllocator*, void*);
  const OrtMemoryInfo* (*Info)(const OrtAllocator*);
};

struct OrtApi {
  void* slots[1];
};

struct OrtApiBase {
  const OrtApi* (*GetApi)(uint32_t version);
  const char* (*GetVersionString)();
};

namespace claq::ort {

constexpr uint32_t kOrtApiVersion = 17;
constexpr uint32_t kOrtCudaApiVersion = 18;  // KernelInfoGetAllocator and KernelContext_GetScratchBuffer

constexpr int kResourceVersion = 1;
constexpr int kCublasHandle = 10002;  // CudaResource::cublas_handle_t

enum ErrorCode : int { kFail = 1, kInvalidArgument = 2, kInvalidGraph = 10 };
enum ElementType : int { kUndefined = 0, kFloat32 = 1, kInt8 = 3, kUint16 = 4, kInt32 = 6, kInt64 = 7, kFloat16 = 10, kUint32 = 12, kBfloat16 = 16 };
enum Characteristic : int { kRequired = 0 };
enum MemoryType : int { kDefaultMemory = 0 };

enum Slot : int {
  kCreateStatus = 0,
  kGetErrorMessage = 2,
  kCreateCustomOpDomain = 26,
  kCustomOpDomainAdd = 27,
  kAddCustomOpDomain = 28,
  kGetTensorMutableData = 51,
  kGetTensorElementType = 60,
  kGetDimensionsCount = 61,
  kGetDimensions = 62,
  kGetTensorTypeAndShape = 65,
  kKernelInfoGetAttributeFloat = 85,
  kKernelInfoGetAttributeInt64 = 86,
  kKernelInfoGetAttributeString = 87,
  kKernelContextGetInput = 90,
  kKernelContextGetOutput = 91,
  kReleaseStatus = 93,
  kReleaseTensorTypeAndShapeInfo = 99,
  kGetAvailableProviders = 125,
  kReleaseAvailableProviders = 126,
  kReleaseAllocator = 132,
  kKernelInfoGetAttributeFloats = 162,
  kKernelInfoGetAttributeInt64s = 163,
  kKernelContextGetGpuComputeStream = 193,
  kKernelInfoGetNodeName = 244,
  kKernelInfoGetConstantInputTensor = 249,
  kKernelContextGetResource = 265,
  kKernelContextParallelFor = 274,
  kKernelContextGetScratchBuffer = 277,
  kKernelInfoGetAllocator = 278,
};

struct CustomOp;

// Layout of OrtCustomOp at version 18. ONNX Runtime reads no more of an operator than its `version` has: of 17, all but the last four.
struct CustomOp {
  uint32_t version;
  void* (*CreateKernel)(const CustomOp*, const OrtApi*, const OrtKernelInfo*);
  const char* (*GetName)(const CustomOp*);
  const char* (*GetExecutionProviderType)(const CustomOp*);
  int (*GetInputType)(const CustomOp*, size_t);
  size_t (*GetInputTypeCount)(const CustomOp*);
  int (*GetOutputType)(const CustomOp*, size_t);
  size_t (*GetOutputTypeCount)(const CustomOp*);
  void (*KernelCompute)(void*, OrtKernelContext*);
  void (*KernelDestroy)(void*);
  int (*GetInputCharacteristic)(const CustomOp*, size_t);
  int (*GetOutputCharacteristic)(const CustomOp*, size_t);
  int (*GetInputMemoryType)(const CustomOp*, size_t);
  int (*GetVariadicInputMinArity)(const CustomOp*);
  int (*GetVariadicInputHomogeneity)(const CustomOp*);
  int (*GetVariadicOutputMinArity)(const CustomOp*);
  int (*GetVariadicOutputHomogeneity)(const CustomOp*);
  OrtStatus* (*CreateKernelV2)(const CustomOp*, const OrtApi*, const OrtKernelInfo*, void**);
  OrtStatus* (*KernelComputeV2)(void*, OrtKernelContext*);
  OrtStatus* (*InferOutputShapeFn)(const CustomOp*, OrtShapeInferContext*);
  int (*GetStartVersion)(const CustomOp*);
  int (*GetEndVersion)(const CustomOp*);
  size_t (*GetMayInplace)(int**, int**);
  void (*ReleaseMayInplace)(int*, int*);
  size_t (*GetAliasMap)(int**, int**);
  void (*ReleaseAliasMap)(int*, int*);
};

// Typed access to the table.
class Api {
 public:
  explicit Api(const OrtApi* table) : table_(table) {}

  OrtStatus* create_status(ErrorCode code, const char* message) const {
    return call<OrtStatus*(int, const char*)>(kCreateStatus)(code, message);
  }
  const char* error_message(const OrtStatus* status) const { return call<const char*(const OrtStatus*)>(kGetErrorMessage)(status); }
  void release_status(OrtStatus* status) const { call<void(OrtStatus*)>(kReleaseStatus)(status); }

  // Names of the execution providers that ONNX Runtime was built with; given back with release_providers.
  OrtStatus* providers(char*** names, int* count) const {
    return call<OrtStatus*(char***, int*)>(kGetAvailableProviders)(names, count);
  }
  OrtStatus* release_providers(char** names, int count) const {
    return call<OrtStatus*(char**, int)>(kReleaseAvailableProviders)(names, count);
  }

  OrtStatus* create_domain(const char* name, OrtCustomOpDomain** out) const {
    return call<OrtStatus*(const char*, OrtCustomOpDomain**)>(kCreateCustomOpDomain)(name, out);
  }
  OrtStatus* add_op(OrtCustomOpDomain* domain, const CustomOp* op) const {
    return call<OrtStatus*(OrtCustomOpDomain*, const CustomOp*)>(kCustomOpDomainAdd)(domain, op);
  }
  OrtStatus* add_domain(OrtSessionOptions* options, OrtCustomOpDomain* domain) const {
    return call<OrtStatus*(OrtSessionOptions*, OrtCustomOpDomain*)>(kAddCustomOpDomain)(options, domain);
  }

  OrtStatus* tensor_data(const OrtValue* value, void** out) const {
    return call<OrtStatus*(OrtValue*, void**)>(kGetTensorMutableData)(const_cast<OrtValue*>(value), out);
  }
  OrtStatus* tensor_info(const OrtValue* value, OrtTensorTypeAndShapeInfo** out) const {
    return call<OrtStatus*(const OrtValue*, OrtTensorTypeAndShapeInfo**)>(kGetTensorTypeAndShape)(value, out);
  }
  OrtStatus* element_type(const OrtTensorTypeAndShapeInfo* info, int* out) const {
    return call<OrtStatus*(const OrtTensorTypeAndShapeInfo*, int*)>(kGetTensorElementType)(info, out);
  }
  OrtStatus* dimension_count(const OrtTensorTypeAndShapeInfo* info, size_t* out) const {
    return call<OrtStatus*(const OrtTensorTypeAndShapeInfo*, size_t*)>(kGetDimensionsCount)(info, out);
  }
  OrtStatus* dimensions(const OrtTensorTypeAndShapeInfo* info, int64_t* out, size_t count) const {
    return call<OrtStatus*(const OrtTensorTypeAndShapeInfo*, int64_t*, size_t)>(kGetDimensions)(info, out, count);
  }
  void release_tensor_info(OrtTensorTypeAndShapeInfo* info) const {
    call<void(OrtTensorTypeAndShapeInfo*)>(kReleaseTensorTypeAndShapeInfo)(info);
  }

  OrtStatus* attribute(const OrtKernelInfo* info, const char* name, float* out) const {
    return call<OrtStatus*(const OrtKernelInfo*, const char*, float*)>(kKernelInfoGetAttributeFloat)(info, name, out);
  }
  OrtStatus* attribute(const OrtKernelInfo* info, const char* name, int64_t* out) const {
    return call<OrtStatus*(const OrtKernelInfo*, const char*, int64_t*)>(kKernelInfoGetAttributeInt64)(info, name, out);
  }
  // The length of an attribute of another type: a string, numbers.
  template <class Element>
  OrtStatus* attribute_length(Slot slot, const OrtKernelInfo* info, const char* name, size_t* length) const {
    return call<OrtStatus*(const OrtKernelInfo*, const char*, Element*, size_t*)>(slot)(info, name, nullptr, length);
  }
  // A status and the size that is needed, the end included, if the name is longer.
  OrtStatus* node_name(const OrtKernelInfo* info, char* out, size_t* size) const {
    return call<OrtStatus*(const OrtKernelInfo*, char*, size_t*)>(kKernelInfoGetNodeName)(info, out, size);
  }
  OrtStatus* constant_input(const OrtKernelInfo* info, size_t index, int* is_constant, const OrtValue** out) const {
    return call<OrtStatus*(const OrtKernelInfo*, size_t, int*, const OrtValue**)>(kKernelInfoGetConstantInputTensor)(
        info, index, is_constant, out);
  }

  OrtStatus* input(const OrtKernelContext* context, size_t index, const OrtValue** out) const {
    return call<OrtStatus*(const OrtKernelContext*, size_t, const OrtValue**)>(kKernelContextGetInput)(context, index, out);
  }
  OrtStatus* output(OrtKernelContext* context, size_t index, const int64_t* shape, size_t rank, OrtValue** out) const {
    return call<OrtStatus*(OrtKernelContext*, size_t, const int64_t*, size_t, OrtValue**)>(kKernelContextGetOutput)(
        context, index, shape, rank, out);
  }
  // Runs task(data, i) for i in [0, total) on the session's intra-op threads.
  OrtStatus* parallel_for(const OrtKernelContext* context, void (*task)(void*, size_t), size_t total, void* data) const {
    return call<OrtStatus*(const OrtKernelContext*, void (*)(void*, size_t), size_t, size_t, void*)>(kKernelContextParallelFor)(
        context, task, total, 0, data);
  }

  // Null without a GPU; otherwise the cudaStream_t that the node's work belongs to.
  OrtStatus* stream(const OrtKernelContext* context, void** out) const {
    return call<OrtStatus*(const OrtKernelContext*, void**)>(kKernelContextGetGpuComputeStream)(context, out);
  }
  OrtStatus* resource(const OrtKernelContext* context, int id, void** out) const {
    return call<OrtStatus*(const OrtKernelContext*, int, int, void**)>(kKernelContextGetResource)(context, kResourceVersion, id, out);
  }
  // The allocator of the node's device; given back with release_allocator.
  OrtStatus* allocator(const OrtKernelInfo* info, OrtAllocator** out) const {
    return call<OrtStatus*(const OrtKernelInfo*, int, OrtAllocator**)>(kKernelInfoGetAllocator)(info, kDefaultMemory, out);
  }
  void release_allocator(OrtAllocator* allocator) const { call<void(OrtAllocator*)>(kReleaseAllocator)(allocator); }
  // Memory for work on the node's stream, freed through the device's allocator once that work is queued.
  OrtStatus* scratch(const OrtKernelContext* context, const OrtMemoryInfo* memory, size_t bytes, void** out) const {
    return call<OrtStatus*(const OrtKernelContext*, const OrtMemoryInfo*, size_t, void**)>(kKernelContextGetScratchBuffer)(
        context, memory, bytes, out);
  }

 private:
  template <class Signature>
  Signature* call(Slot slot) const {
    return reinterpret_cast<Signature*>(table_->slots[slot]);
  }

  const OrtApi* table_;
};

}  // namespace claq::ort
