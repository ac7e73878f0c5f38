// What the operators of the domain com.claq share on all devices: how ONNX Runtime is told of them, and how a node's attributes
// and constant inputs become the descriptor of a layer.
#pragma once

#include <algorithm>
#include <array>
#include <exception>
#include <initializer_list>
#include <string>
#include <vector>

#include "../epilogue.h"
#include "../exceptions.h"
#include "../layer.h"
#include "../parallel.h"
#include "api.h"

namespace claq::ort {

enum class Operator { kMatMul, kMatMulAdd, kMatMulAddNorm, kMatMulRotary, kMatMulSplit, kMatMulSwiGlu, kGather };

constexpr Operator kProducts[] = {Operator::kMatMul, Operator::kMatMulAdd, Operator::kMatMulAddNorm, Operator::kMatMulRotary,
                                   Operator::kMatMulSplit, Operator::kMatMulSwiGlu};

// Inputs of a layer: the activations (of ClaqGather `indices`), its tensors, and the bias. Of ClaqGather the last is `like`: nothing
// but a dtype, that of the result.
constexpr size_t kInputs = 10;
constexpr size_t kLike = kInputs - 1;
// Behind them ClaqMatMulAdd and ClaqMatMulAddNorm have what is added, the latter also the weight of the normalization.
constexpr size_t kResidual = kInputs;
constexpr size_t kNormWeight = kInputs + 1;
// Those of ClaqMatMulRotary.
constexpr size_t kCos = kInputs;
constexpr size_t kSin = kInputs + 1;

size_t input_count(Operator kind);
size_t output_count(Operator kind);

// A status of ONNX Runtime on its way through C++ frames.
struct StatusError {
  OrtStatus* status;
};

inline void check(OrtStatus* status) {
  if (status) throw StatusError{status};
}

// A claq_parallel_for on the session's own threads.
struct SessionThreads {
  const Api* api;
  OrtKernelContext* context;

  // Throws StatusError: tasks that did not run leave memory unwritten, so nothing may go on.
  static void parallel_for(void* opaque, void (*task)(void*, size_t), size_t total, void* data) {
    const auto* self = static_cast<const SessionThreads*>(opaque);
    check(self->api->parallel_for(self->context, task, total, data));
  }
};

// Calls body(host) with the session's threads as the host's.
template <class Body>
void with_session_threads(const Api& api, OrtKernelContext* context, Body body) {
  SessionThreads threads{&api, context};
  body(Host{SessionThreads::parallel_for, &threads, kAwakeTaskSeconds});
}

// Runs `body` and turns whatever it throws into a status; nothing is thrown across the C interface.
template <class Body>
OrtStatus* guarded(const Api& api, Body body) noexcept {
  ready_to_throw();
  try {
    body();
    return nullptr;
  } catch (const StatusError& error) {
    return error.status;
  } catch (const InvalidLayer& error) {
    return api.create_status(kInvalidGraph, error.what());
  } catch (const InvalidArgument& error) {
    return api.create_status(kInvalidArgument, error.what());
  } catch (const std::exception& error) {
    return api.create_status(kFail, error.what());
  } catch (...) {
    return api.create_status(kFail, "libclaq: unknown failure");
  }
}

// The sizes of a tensor, without memory of its own: an operator of a decoding step reads three of them in every run.
class Shape {
 public:
  static constexpr size_t kMostAxes = 16;

  Shape() = default;
  Shape(std::initializer_list<int64_t> sizes) {
    for (const int64_t size : sizes) push_back(size);
  }
  // At most kMostAxes, which the caller has checked.
  void resize(size_t axes) { axes_ = axes; }
  void push_back(int64_t size) {
    resize(axes_ + 1);
    back() = size;
  }
  size_t size() const { return axes_; }
  bool empty() const { return axes_ == 0; }
  int64_t* data() { return sizes_; }
  const int64_t* data() const { return sizes_; }
  const int64_t* begin() const { return sizes_; }
  const int64_t* end() const { return sizes_ + axes_; }
  int64_t& operator[](size_t axis) { return sizes_[axis]; }
  int64_t& back() { return sizes_[axes_ - 1]; }
  int64_t back() const { return sizes_[axes_ - 1]; }
  bool operator==(const Shape& other) const { return std::equal(begin(), end(), other.begin(), other.end()); }
  bool operator!=(const Shape& other) const { return !(*this == other); }

 private:
  size_t axes_ = 0;
  int64_t sizes_[kMostAxes];
};

struct TensorInfo {
  int type = kUndefined;
  Shape shape;
};

// Throws InvalidArgument for more than `most_axes`, with the names of the tensor and, if there is one, of the operator.
TensorInfo describe(const Api& api, const OrtValue* value, const char* name, const char* operator_name = nullptr,
                    size_t most_axes = Shape::kMostAxes);

// A node's layer: the descriptor points to shapes kept beside it and to the data of the node's constant inputs.
struct NodeLayer {
  claq_layer_desc desc{};
  std::array<TensorInfo, kInputs> infos;
};

// Throws InvalidLayer if an attribute is missing or an input is not constant, InvalidArgument as `describe`.
void read_layer(const Api& api, const OrtKernelInfo* info, Operator kind, NodeLayer& layer);

// A long name is shortened.
std::string node_name(const Api& api, const OrtKernelInfo* info);

// Puts the kernel that `make` gives (a pointer that the caller owns) into `out`; what is wrong gets the node's name in front.
template <class Make>
OrtStatus* make_kernel(const Api& api, const OrtKernelInfo* info, const char* operator_name, void** out, Make make) {
  *out = nullptr;
  return guarded(api, [&] {
    const auto named = [&](const std::exception& error) {
      return std::string(operator_name) + " node '" + node_name(api, info) + "': " + error.what();
    };
    try {
      *out = make();
    } catch (const InvalidLayer& error) {
      throw InvalidLayer(named(error));
    } catch (const InvalidArgument& error) {
      throw InvalidArgument(named(error));
    }
  });
}

// Whether there is such an attribute, whose value it then gives. Throws InvalidLayer if that is no integer.
bool integer_attribute(const Api& api, const OrtKernelInfo* info, const char* name, int64_t& value);

// Throws InvalidLayer if it is missing or no integer.
int64_t required_attribute(const Api& api, const OrtKernelInfo* info, const char* name);

// The last dimension of each output of a node that multiplies; -1 where it has none.
using Outputs = std::array<int64_t, kMostParts>;

// Throws InvalidLayer if an attribute is missing, or does not fit the layer's number of outputs.
Outputs read_outputs(const Api& api, const OrtKernelInfo* info, Operator kind, int64_t out_features);

// Of ClaqMatMulAddNorm. Throws InvalidLayer if it is missing or not positive.
float read_epsilon(const Api& api, const OrtKernelInfo* info);

// The data of ClaqMatMulAddNorm's norm_weight if it is constant and fits; else null, and each run looks at it.
const void* constant_norm_weight(const Api& api, const OrtKernelInfo* info, int64_t out_features);

// What ClaqMatMulRotary turns of the first two parts, without the angles. Throws InvalidLayer if an attribute is missing or does not
// fit the parts.
Rotary read_rotary(const Api& api, const OrtKernelInfo* info, const Outputs& outputs);

// Tensors of a node that multiplies at run time; the outputs are made here.
struct MatMulTensors {
  int type;  // claq_dtype
  int64_t rows;
  const void* x;
  const void* residual;     // null where there is none
  const void* norm_weight;  // likewise
  Rotary rotary;
  std::array<void*, kMostParts> y;
};

// `rotary`: what read_rotary gave, `norm_weight`: what constant_norm_weight found. Throws InvalidArgument if a shape does not fit.
MatMulTensors matmul_tensors(const Api& api, OrtKernelContext* context, Operator kind, int64_t in_features, const Outputs& outputs,
                             const Rotary& rotary, const void* norm_weight);

// Input `indices` of a ClaqGather node at run time, and its output, which is made here.
struct GatherTensors {
  int index_type;  // claq_dtype
  int64_t count;
  const void* indices;
  void* y;
};

GatherTensors gather_tensors(const Api& api, OrtKernelContext* context, int64_t in_features);

// ONNX Runtime matches an operator by its input types, so there is one registration for each combination.
struct TypedOp : CustomOp {
  Operator kind;
  int first;       // of `x` or `indices`
  int activation;  // of the result and of the last input
  int order;
  int outlier_index;
};

inline const TypedOp& typed(const CustomOp* op) { return *static_cast<const TypedOp*>(op); }

const char* operator_name(Operator kind);

// Fills in what is the same for every operator: no optional, variadic or host-memory inputs, version 1.
void describe_common(CustomOp& op);

// An operator without the functions that make, run and destroy a kernel.
TypedOp describe_op(const char* (*provider)(const CustomOp*), Operator kind, int first, int activation, int order, int outlier_index);

// The operators of each device, one for every combination of types; valid as long as the process.
const std::vector<TypedOp>& cpu_ops();
const std::vector<TypedOp>& cuda_ops();

// ClaqAttention and ClaqCachedAttention on the CPU, likewise.
const std::array<const CustomOp*, 3>& attention_ops();

}  // namespace claq::ort
