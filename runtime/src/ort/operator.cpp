#include "operator.h"

#include <cstring>
#include <memory>

namespace claq::ort {
namespace {

constexpr const char* kInputNames[] = {"x",           "codes",         "codebook",      "scale", "row_scale", "order",
                                       "outlier_ptr", "outlier_index", "outlier_value", "bias"};

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
    default: return op.activation;  // bias or like, and what fused operators take behind it
  }
}

}  // namespace

bool integer_attribute(const Api& api, const OrtKernelInfo* info, const char* name, int64_t& value) {
  // ONNX Runtime has the same status for an attribute that is missing and for one of another type.
  const auto succeeds = [&api](OrtStatus* status) {
    if (status) api.release_status(status);
    return !status;
  };
  if (succeeds(api.attribute(info, name, &value))) return true;
  float number = 0;
  size_t length = 0;
  if (succeeds(api.attribute(info, name, &number)) ||
      succeeds(api.attribute_length<char>(kKernelInfoGetAttributeString, info, name, &length)) ||
      succeeds(api.attribute_length<float>(kKernelInfoGetAttributeFloats, info, name, &length)) ||
      succeeds(api.attribute_length<int64_t>(kKernelInfoGetAttributeInt64s, info, name, &length))) {
    throw InvalidLayer(std::string(name) + ": the attribute is of another type, expected an integer");
  }
  return false;
}

int64_t required_attribute(const Api& api, const OrtKernelInfo* info, const char* name) {
  int64_t value = 0;
  if (!integer_attribute(api, info, name, value)) throw InvalidLayer(std::string(name) + ": the attribute is missing, expected an integer");
  return value;
}

TensorInfo describe(const Api& api, const OrtValue* value, const char* name, const char* operator_name, size_t most_axes) {
  OrtTensorTypeAndShapeInfo* raw = nullptr;
  check(api.tensor_info(value, &raw));
  const auto release = [&api](OrtTensorTypeAndShapeInfo* info) { api.release_tensor_info(info); };
  const std::unique_ptr<OrtTensorTypeAndShapeInfo, decltype(release)> info(raw, release);
  TensorInfo result;
  size_t rank = 0;
  check(api.element_type(info.get(), &result.type));
  check(api.dimension_count(info.get(), &rank));
  if (rank > most_axes) {
    throw InvalidArgument((operator_name ? std::string(operator_name) + ": " : "") + name + ": has " + std::to_string(rank) +
                          " axes, expected at most " + std::to_string(most_axes));
  }
  result.shape.resize(rank);
  check(api.dimensions(info.get(), result.shape.data(), rank));
  return result;
}

std::string node_name(const Api& api, const OrtKernelInfo* info) {
  constexpr size_t kMost = 256;
  std::string name(kMost, '\0');
  size_t size = name.size();
  if (OrtStatus* status = api.node_name(info, name.data(), &size)) {
    api.release_status(status);
    if (size <= name.size()) return "";
    name.resize(size);
    check(api.node_name(info, name.data(), &size));
  }
  name.resize(std::strlen(name.c_str()));
  if (name.size() <= kMost) return name;
  size_t end = kMost;
  while (end > 0 && (name[end] & 0xc0) == 0x80) --end;  // no character of UTF-8 is cut
  return name.substr(0, end) + "...";
}

void read_layer(const Api& api, const OrtKernelInfo* info, Operator kind, NodeLayer& layer) {
  const bool gathers = kind == Operator::kGather;
  claq_layer_desc& desc = layer.desc;
  auto& infos = layer.infos;
  desc.struct_size = sizeof desc;
  desc.in_features = required_attribute(api, info, "in_features");
  desc.out_features = required_attribute(api, info, "out_features");
  desc.columns_4 = required_attribute(api, info, "columns_4");
  desc.columns_3 = required_attribute(api, info, "columns_3");
  desc.columns_2 = required_attribute(api, info, "columns_2");
  claq_tensor* const tensors[kInputs] = {nullptr,           &desc.codes,         &desc.codebook,      &desc.scale, &desc.row_scale,
                                         &desc.order,       &desc.outlier_ptr,   &desc.outlier_index, &desc.outlier_value,
                                         &desc.bias};
  for (size_t i = 1; i < kInputs; ++i) {
    int is_constant = 0;
    const OrtValue* value = nullptr;
    check(api.constant_input(info, i, &is_constant, &value));
    const char* const name = gathers && i == kLike ? "like" : kInputNames[i];
    if (!is_constant || !value) {
      throw InvalidLayer(std::string(name) + ": is computed by the graph or fed at run time, expected a constant initializer");
    }
    void* data = nullptr;
    check(api.tensor_data(value, &data));
    infos[i] = describe(api, value, name);
    *tensors[i] = {data, infos[i].shape.data(), static_cast<int32_t>(infos[i].shape.size()), infos[i].type};
    // A zero-rank tensor has no shape to point to.
    static constexpr int64_t kNoShape = 0;
    if (infos[i].shape.empty()) tensors[i]->shape = &kNoShape;
  }
  if (gathers && infos[kLike].shape != Shape{0}) {
    throw InvalidLayer("like: expected a tensor of one dimension of length 0, it only gives the dtype of the result");
  }
}

Outputs read_outputs(const Api& api, const OrtKernelInfo* info, Operator kind, int64_t out_features) {
  Outputs outputs{out_features, kind == Operator::kMatMulAddNorm ? out_features : -1, -1};
  if (kind == Operator::kMatMulSwiGlu) {
    if (out_features % 2) throw InvalidLayer("out_features: is " + std::to_string(out_features) + ", expected an even number");
    outputs[0] = out_features / 2;
  } else if (kind == Operator::kMatMulSplit || kind == Operator::kMatMulRotary) {
    int64_t rest = out_features;
    for (int i = 0; i < kMostParts; ++i) {
      const std::string name = "split_" + std::to_string(i);
      outputs[i] = required_attribute(api, info, name.c_str());
      // Each is compared with what is left, so that no sum can overflow.
      if (outputs[i] < 0 || outputs[i] > rest || (i + 1 == kMostParts && outputs[i] != rest)) {
        throw InvalidLayer(name + ": is " + std::to_string(outputs[i]) + ", expected parts of out_features = " +
                           std::to_string(out_features));
      }
      rest -= outputs[i];
    }
  }
  return outputs;
}

float read_epsilon(const Api& api, const OrtKernelInfo* info) {
  float value = 0;
  if (OrtStatus* status = api.attribute(info, "epsilon", &value)) {
    api.release_status(status);
    throw InvalidLayer("epsilon: the attribute is missing, expected a float");
  }
  if (!(value >= 0) || value > 1) throw InvalidLayer("epsilon: is " + std::to_string(value) + ", expected a number from 0 to 1");
  return value;
}

const void* constant_norm_weight(const Api& api, const OrtKernelInfo* info, int64_t out_features) {
  int is_constant = 0;
  const OrtValue* value = nullptr;
  check(api.constant_input(info, kNormWeight, &is_constant, &value));
  if (!is_constant || !value || describe(api, value, "norm_weight").shape != Shape{out_features}) return nullptr;
  void* data = nullptr;
  check(api.tensor_data(value, &data));
  return data;
}

Rotary read_rotary(const Api& api, const OrtKernelInfo* info, const Outputs& outputs) {
  Rotary rotary{};
  std::array<int64_t, 2> sizes{};
  for (size_t i = 0; i < sizes.size(); ++i) {
    const std::string name = "heads_" + std::to_string(i);
    const int64_t heads = rotary.heads[i] = required_attribute(api, info, name.c_str());
    if (heads < 1 || outputs[i] % heads) {
      throw InvalidLayer(name + ": is " + std::to_string(heads) + ", expected a divisor of split_" + std::to_string(i) + " = " +
                         std::to_string(outputs[i]));
    }
    sizes[i] = outputs[i] / heads;
  }
  const int64_t given = required_attribute(api, info, "rotary_dim"), least = std::min(sizes[0], sizes[1]);
  // 0 turns heads as a whole, as in RotaryEmbedding; the angles are those of both parts.
  const int64_t turned = given == 0 && sizes[0] == sizes[1] ? least : given;
  if (turned < 1 || turned > least || turned % 2) {
    throw InvalidLayer("rotary_dim: is " + std::to_string(given) + ", expected an even number of at most " + std::to_string(least) +
                       ", the size of a head, or 0 if all heads are of one even size");
  }
  rotary.half = turned / 2;
  return rotary;
}

MatMulTensors matmul_tensors(const Api& api, OrtKernelContext* context, Operator kind, int64_t in_features, const Outputs& outputs,
                             const Rotary& rotary, const void* norm_weight) {
  const OrtValue* x = nullptr;
  check(api.input(context, 0, &x));
  TensorInfo info = describe(api, x, kInputNames[0], operator_name(kind));
  if (info.shape.empty() || info.shape.back() != in_features) {
    throw InvalidArgument(std::string(operator_name(kind)) + ": x: the last dimension is " +
                          (info.shape.empty() ? "missing" : std::to_string(info.shape.back())) +
                          ", expected in_features = " + std::to_string(in_features));
  }
  MatMulTensors tensors{info.type, 1, nullptr, nullptr, nullptr, rotary, {}};
  for (size_t i = 0; i + 1 < info.shape.size(); ++i) tensors.rows *= info.shape[i];
  for (int i = 0; i < kMostParts && outputs[i] >= 0; ++i) {
    info.shape.back() = outputs[i];
    OrtValue* y = nullptr;
    check(api.output(context, i, info.shape.data(), info.shape.size(), &y));
    check(api.tensor_data(y, &tensors.y[i]));
  }
  void* data = nullptr;
  const auto other = [&](size_t input, const Shape& shape, const char* name, const char* expected) {
    const OrtValue* value = nullptr;
    check(api.input(context, input, &value));
    if (describe(api, value, name, operator_name(kind)).shape != shape) {
      throw InvalidArgument(std::string(operator_name(kind)) + ": " + name + ": expected " + expected);
    }
    check(api.tensor_data(value, &data));
    return data;
  };
  if (kind == Operator::kMatMulRotary) {
    const OrtValue* cos = nullptr;
    check(api.input(context, kCos, &cos));
    const Shape angles = describe(api, cos, "cos", operator_name(kind)).shape;
    if (angles.empty() || angles.back() != rotary.half) {
      throw InvalidArgument(std::string(operator_name(kind)) + ": cos: the last dimension is " +
                            (angles.empty() ? "missing" : std::to_string(angles.back())) + ", expected rotary_dim / 2 = " +
                            std::to_string(rotary.half));
    }
    info.shape.back() = rotary.half;
    tensors.rotary.cos = other(kCos, info.shape, "cos", "a row for each row of x");
    tensors.rotary.sin = other(kSin, info.shape, "sin", "the shape of cos");
  }
  if (kind == Operator::kMatMulAdd || kind == Operator::kMatMulAddNorm) {
    tensors.residual = other(kResidual, info.shape, "residual", "the shape of the result");
  }
  if (kind == Operator::kMatMulAddNorm) {
    tensors.norm_weight = norm_weight ? norm_weight : other(kNormWeight, {outputs[0]}, "norm_weight", "one value for each output");
  }
  check(api.tensor_data(x, &data));
  tensors.x = data;
  return tensors;
}

GatherTensors gather_tensors(const Api& api, OrtKernelContext* context, int64_t in_features) {
  const OrtValue* indices = nullptr;
  check(api.input(context, 0, &indices));
  TensorInfo info = describe(api, indices, "indices", operator_name(Operator::kGather), Shape::kMostAxes - 1);  // y has one more
  int64_t count = 1;
  for (const int64_t size : info.shape) count *= size;
  info.shape.push_back(in_features);
  OrtValue* y = nullptr;
  check(api.output(context, 0, info.shape.data(), info.shape.size(), &y));
  void *index_data = nullptr, *y_data = nullptr;
  check(api.tensor_data(indices, &index_data));
  check(api.tensor_data(y, &y_data));
  return {info.type, count, index_data, y_data};
}

const char* operator_name(Operator kind) {
  switch (kind) {
    case Operator::kMatMulAdd: return "ClaqMatMulAdd";
    case Operator::kMatMulAddNorm: return "ClaqMatMulAddNorm";
    case Operator::kMatMulRotary: return "ClaqMatMulRotary";
    case Operator::kMatMulSplit: return "ClaqMatMulSplit";
    case Operator::kMatMulSwiGlu: return "ClaqMatMulSwiGLU";
    case Operator::kGather: return "ClaqGather";
    default: return "ClaqMatMul";
  }
}

size_t input_count(Operator kind) {
  switch (kind) {
    case Operator::kMatMulAdd: return kResidual + 1;
    case Operator::kMatMulAddNorm: return kNormWeight + 1;
    case Operator::kMatMulRotary: return kSin + 1;
    default: return kInputs;
  }
}

size_t output_count(Operator kind) {
  switch (kind) {
    case Operator::kMatMulAddNorm: return 2;
    case Operator::kMatMulRotary:
    case Operator::kMatMulSplit: return kMostParts;
    default: return 1;
  }
}

void describe_common(CustomOp& op) {
  op.GetInputCharacteristic = [](const CustomOp*, size_t) -> int { return kRequired; };
  op.GetOutputCharacteristic = [](const CustomOp*, size_t) -> int { return kRequired; };
  op.GetInputMemoryType = [](const CustomOp*, size_t) -> int { return kDefaultMemory; };
  op.GetVariadicInputMinArity = [](const CustomOp*) { return 1; };
  op.GetVariadicInputHomogeneity = [](const CustomOp*) { return 1; };
  op.GetVariadicOutputMinArity = [](const CustomOp*) { return 1; };
  op.GetVariadicOutputHomogeneity = [](const CustomOp*) { return 1; };
  op.GetStartVersion = [](const CustomOp*) { return 1; };
  op.GetEndVersion = [](const CustomOp*) { return 1; };
}

TypedOp describe_op(const char* (*provider)(const CustomOp*), Operator kind, int first, int activation, int order, int outlier_index) {
  TypedOp op{};
  op.version = kOrtApiVersion;
  op.kind = kind;
  op.first = first;
  op.activation = activation;
  op.order = order;
  op.outlier_index = outlier_index;
  op.GetName = [](const CustomOp* self) { return operator_name(typed(self).kind); };
  op.GetExecutionProviderType = provider;
  op.GetInputTypeCount = [](const CustomOp* self) { return input_count(typed(self).kind); };
  op.GetInputType = [](const CustomOp* self, size_t index) { return input_type(typed(self), index); };
  op.GetOutputTypeCount = [](const CustomOp* self) { return output_count(typed(self).kind); };
  op.GetOutputType = [](const CustomOp* self, size_t) { return typed(self).activation; };
  describe_common(op);
  return op;
}

}  // namespace claq::ort
