// The parts of ONNX Runtime's stable C interface that the example uses, declared from its public documentation, because a
// wheel carries the library but no headers. With the headers of a release at hand, include onnxruntime_c_api.h instead.
#pragma once

#include <cstddef>
#include <cstdint>

struct OrtApi {
  void* slots[101];
};
struct OrtApiBase {
  const OrtApi* (*GetApi)(uint32_t version);
  const char* (*GetVersionString)();
};
extern "C" const OrtApiBase* OrtGetApiBase();

// Positions in the table, which only ever grows at its end.
enum Slot {
  kGetErrorMessage = 2,
  kCreateEnv = 3,
  kCreateSession = 7,
  kRun = 9,
  kCreateSessionOptions = 10,
  kSetIntraOpNumThreads = 24,
  kRegisterCustomOpsLibrary = 29,
  kSessionGetInputCount = 30,
  kSessionGetInputTypeInfo = 33,
  kSessionGetInputName = 36,
  kCreateTensorAsOrtValue = 48,
  kGetTensorMutableData = 51,
  kCastTypeInfoToTensorInfo = 55,
  kGetTensorElementType = 60,
  kGetDimensions = 62,
  kGetTensorTypeAndShape = 65,
  kGetAllocatorWithDefaultOptions = 78,
  kReleaseStatus = 93,
  kReleaseValue = 96,
  kReleaseTensorTypeAndShapeInfo = 99,
};
enum ElementType { kFloat = 1, kInt64 = 7 };
