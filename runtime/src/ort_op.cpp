// The ONNX Runtime operators com.claq::ClaqMatMul and com.claq::ClaqGather and the library's entry point RegisterCustomOps.
#include <array>
#include <exception>
#include <memory>
#include <string>
#include <vector>

#include "gather.h"
#include "layer.h"
#include "ort_api.h"
#include "run.h"

namespace claq::ort {
namespace {

constexpr const char* kInputNames[] = {"x",           "codes",         "codebook",      "scale", "row_scale", "order",
                                       "outlier_ptr", "outlier_index", "outlier_value", "bias"};
constexpr size_t kInputs = 10;
// Of ClaqGather the first input is `indices` and the last is `like`: nothing but a dtype, that of the result.
constexpr size_t kLike = kInputs - 1;

// A status of ONNX Runtime on its way through C++ frames.
struct StatusError {
  OrtStatus* status;
};

void check(OrtStatus* status) {
  if (status) throw StatusError{status};
}

// Runs `body` and turns whatever it throws into a status; nothing is thrown across the C interface.
template <class Body>
OrtStatus* guarded(const Api& api, Body body) noexcept {
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

struct TensorInfo {
  int type = kUndefined;
  std::vector<int64_t> shape;
};

TensorInfo describe(const Api& api, const OrtValue* value) {
  OrtTensorTypeAndShapeInfo* raw = nullptr;
  check(api.tensor_info(value, &raw));
  const auto release = [&api](OrtTensorTypeAndShapeInfo* info) { api.release_tensor_info(info); };
  const std::unique_ptr<OrtTensorTypeAndShapeInfo, decltype(release)> info(raw, release);
  TensorInfo result;
  size_t rank = 0;
  check(api.element_type(info.get(), &result.type));
  check(api.dimension_count(info.get(), &rank));
  result.shape.resize(rank);
  check(api.dimensions(info.get(), result.shape.data(), rank));
  return result;
}

struct Kernel {
  Api api;
  std::unique_ptr<claq_layer> layer;
  int32_t accuracy_level;
};

std::string node_name(const Api& api, const OrtKernelInfo* info) {
  char name[256] = "";
  size_t size = sizeof name;
  if (OrtStatus* status = api.node_name(info, name, &size)) {
    api.release_status(status);  // a longer name: the message does without it
    return "";
  }
  return name;
}

int64_t required_attribute(const Api& api, const OrtKernelInfo* info, const char* name) {
  int64_t value = 0;
  if (OrtStatus* status = api.attribute(info, name, &value)) {
    api.release_status(status);
    throw InvalidLayer(std::string(name) + ": the attribute is missing, expected an integer");
  }
  return value;
}

int32_t accuracy_level(const Api& api, const OrtKernelInfo* info) {
  int64_t value = 0;
  if (OrtStatus* status = api.attribute(info, "accuracy_level", &value)) {
    api.release_status(status);
    return 0;  // as for MatMulNBits, the default is float32 arithmetic
  }
  if (value != 0 && value != 1 && value != 4) {
    throw InvalidLayer("accuracy_level: is " + std::to_string(value) + ", expected 0, 1 or 4");
  }
  return static_cast<int32_t>(value);
}

std::unique_ptr<Kernel> create(const Api& api, const OrtKernelInfo* info, bool gathers) {
  claq_layer_desc desc{};
  desc.struct_size = sizeof desc;
  desc.in_features = required_attribute(api, info, "in_features");
  desc.out_features = required_attribute(api, info, "out_features");
  desc.columns_4 = required_attribute(api, info, "columns_4");
  desc.columns_3 = required_attribute(api, info, "columns_3");
  desc.columns_2 = required_attribute(api, info, "columns_2");
  claq_tensor* const tensors[kInputs] = {nullptr,           &desc.codes,         &desc.codebook,      &desc.scale, &desc.row_scale,
                                         &desc.order,       &desc.outlier_ptr,   &desc.outlier_index, &desc.outlier_value,
                                         &desc.bias};
  std::array<TensorInfo, kInputs> infos;
  for (size_t i = 1; i < kInputs; ++i) {
    int is_constant = 0;
    const OrtValue* value = nullptr;
    check(api.constant_input(info, i, &is_constant, &value));
    if (!is_constant || !value) {
      throw InvalidLayer(std::string(gathers && i == kLike ? "like" : kInputNames[i]) +
                         ": is computed by the graph or fed at run time, expected a constant initializer");
    }
    void* data = nullptr;
    check(api.tensor_data(value, &data));
    infos[i] = describe(api, value);
    *tensors[i] = {data, infos[i].shape.data(), static_cast<int32_t>(infos[i].shape.size()), infos[i].type};
    // A zero-rank tensor has no shape to point to.
    static constexpr int64_t kNoShape = 0;
    if (infos[i].shape.empty()) tensors[i]->shape = &kNoShape;
  }
  if (gathers && infos[kLike].shape != std::vector<int64_t>{0}) {
    throw InvalidLayer("like: expected a tensor of one dimension of length 0, it only gives the dtype of the result");
  }
  auto kernel = std::make_unique<Kernel>(Kernel{api, nullptr, gathers ? 0 : accuracy_level(api, info)});
  kernel->layer = make_layer(desc);
  return kernel;
}

// A claq_parallel_for on the session's own threads.
struct SessionThreads {
  const Api* api;
  OrtKernelContext* context;
  OrtStatus* failure;

  static void parallel_for(void* opaque, void (*task)(void*, size_t), size_t total, void* data) {
    auto* self = static_cast<SessionThreads*>(opaque);
    OrtStatus* status = self->api->parallel_for(self->context, task, total, data);
    if (status && self->failure) self->api->release_status(status);
    else if (status) self->failure = status;
  }
};

void multiply(const Kernel& kernel, OrtKernelContext* context) {
  const Api& api = kernel.api;
  const LayerView& layer = kernel.layer->view;
  const OrtValue* x = nullptr;
  check(api.input(context, 0, &x));
  TensorInfo info = describe(api, x);
  if (info.shape.empty() || info.shape.back() != layer.in_features) {
    throw InvalidArgument("ClaqMatMul: x: the last dimension is " + (info.shape.empty() ? "missing" : std::to_string(info.shape.back())) +
                          ", expected in_features = " + std::to_string(layer.in_features));
  }
  int64_t rows = 1;
  for (size_t i = 0; i + 1 < info.shape.size(); ++i) rows *= info.shape[i];
  info.shape.back() = layer.out_features;
  OrtValue* y = nullptr;
  check(api.output(context, 0, info.shape.data(), info.shape.size(), &y));
  void *x_data = nullptr, *y_data = nullptr;
  check(api.tensor_data(x, &x_data));
  check(api.tensor_data(y, &y_data));

  SessionThreads threads{&api, context, nullptr};
  run(*kernel.layer, static_cast<claq_dtype>(info.type), kernel.accuracy_level, x_data, rows, y_data, SessionThreads::parallel_for,
      &threads);
  check(threads.failure);
}

void gather_rows(const Kernel& kernel, OrtKernelContext* context) {
  const Api& api = kernel.api;
  const OrtValue *indices = nullptr, *like = nullptr;
  check(api.input(context, 0, &indices));
  check(api.input(context, kLike, &like));
  TensorInfo info = describe(api, indices);
  int64_t count = 1;
  for (const int64_t size : info.shape) count *= size;
  info.shape.push_back(kernel.layer->view.in_features);
  OrtValue* y = nullptr;
  check(api.output(context, 0, info.shape.data(), info.shape.size(), &y));
  void *index_data = nullptr, *y_data = nullptr;
  check(api.tensor_data(indices, &index_data));
  check(api.tensor_data(y, &y_data));
  SessionThreads threads{&api, context, nullptr};
  try {
    gather(*kernel.layer, static_cast<claq_dtype>(info.type), index_data, count, static_cast<claq_dtype>(describe(api, like).type),
           y_data, SessionThreads::parallel_for, &threads);
  } catch (const InvalidArgument& error) {
    throw InvalidArgument(std::string("ClaqGather: ") + error.what());
  }
  check(threads.failure);
}

// ONNX Runtime matches an operator by its input types, so there is one registration for each combination.
struct TypedOp : CustomOp {
  bool gathers;    // ClaqGather, else ClaqMatMul
  int first;       // of `x` or `indices`
  int activation;  // of the result and of the last input
  int order;
  int outlier_index;
};

const TypedOp& typed(const CustomOp* op) { return *static_cast<const TypedOp*>(op); }

int input_type(const TypedOp& op, size_t index) {
  switch (index) {
    case 0: return op.first;
    case 1: return kUint32;
    case 2: return kInt8;
    case 3:
    case 4:
    case 8: return kFloat16;
    case 5: return op.order;
    case 6: return kInt32;
    case 7: return op.outlier_index;
    default: return op.activation;
  }
}

const char* operator_name(const CustomOp* op) { return typed(op).gathers ? "ClaqGather" : "ClaqMatMul"; }

TypedOp make_op(bool gathers, int first, int activation, int order, int outlier_index) {
  TypedOp op{};
  op.version = kOrtApiVersion;
  op.gathers = gathers;
  op.first = first;
  op.activation = activation;
  op.order = order;
  op.outlier_index = outlier_index;
  op.GetName = operator_name;
  op.GetExecutionProviderType = [](const CustomOp*) { return "CPUExecutionProvider"; };
  op.GetInputTypeCount = [](const CustomOp*) { return kInputs; };
  op.GetInputType = [](const CustomOp* self, size_t index) { return input_type(typed(self), index); };
  op.GetOutputTypeCount = [](const CustomOp*) -> size_t { return 1; };
  op.GetOutputType = [](const CustomOp* self, size_t) { return typed(self).activation; };
  op.GetInputCharacteristic = [](const CustomOp*, size_t) -> int { return kRequired; };
  op.GetOutputCharacteristic = [](const CustomOp*, size_t) -> int { return kRequired; };
  op.GetInputMemoryType = [](const CustomOp*, size_t) -> int { return kDefaultMemory; };
  op.GetVariadicInputMinArity = [](const CustomOp*) { return 1; };
  op.GetVariadicInputHomogeneity = [](const CustomOp*) { return 1; };
  op.GetVariadicOutputMinArity = [](const CustomOp*) { return 1; };
  op.GetVariadicOutputHomogeneity = [](const CustomOp*) { return 1; };
  op.GetStartVersion = [](const CustomOp*) { return 1; };
  op.GetEndVersion = [](const CustomOp*) { return 1; };
  op.CreateKernelV2 = [](const CustomOp* self, const OrtApi* table, const OrtKernelInfo* info, void** out) {
    const Api api(table);
    *out = nullptr;
    return guarded(api, [&] {
      try {
        *out = create(api, info, typed(self).gathers).release();
      } catch (const InvalidLayer& error) {
        throw InvalidLayer(std::string(operator_name(self)) + " node '" + node_name(api, info) + "': " + error.what());
      }
    });
  };
  if (gathers) {
    op.KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
      const Kernel& self = *static_cast<const Kernel*>(kernel);
      return guarded(self.api, [&] { gather_rows(self, context); });
    };
  } else {
    op.KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
      const Kernel& self = *static_cast<const Kernel*>(kernel);
      return guarded(self.api, [&] { multiply(self, context); });
    };
  }
  op.KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  return op;
}

const std::vector<TypedOp>& all_ops() {
  static const auto* ops = [] {
    auto* list = new std::vector<TypedOp>;
    for (const int activation : {kFloat32, kFloat16, kBfloat16}) {
      for (const int order : {kUint16, kInt32}) {
        for (const int outlier_index : {kUint16, kInt32}) {
          list->push_back(make_op(false, activation, activation, order, outlier_index));
          for (const int index : {kInt32, kInt64}) list->push_back(make_op(true, index, activation, order, outlier_index));
        }
      }
    }
    return list;
  }();
  return *ops;
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
    for (const TypedOp& op : all_ops()) check(api.add_op(domain, &op));
    check(api.add_domain(options, domain));
  });
}
