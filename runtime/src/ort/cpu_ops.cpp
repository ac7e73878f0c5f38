// The operators on the CPU.
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "../epilogue.h"
#include "../gather.h"
#include "../run.h"
#include "operator.h"

namespace claq::ort {
namespace {

struct Kernel {
  Api api;
  Operator kind;
  std::unique_ptr<claq_layer> layer;
  int32_t accuracy_level;
  Outputs outputs;
  float epsilon;
  Rotary rotary;
  const void* norm_weight;
};

// What the node says, unless the environment variable CLAQ_ACCURACY says otherwise for the whole process.
int32_t accuracy_level(const Api& api, const OrtKernelInfo* info) {
  const char* forced = std::getenv("CLAQ_ACCURACY");
  if (forced && *forced) {
    const std::string name = forced;
    if (name == "fp32") return 0;
    if (name == "int8") return 4;
    throw InvalidArgument("CLAQ_ACCURACY: is '" + name + "', expected fp32 or int8");
  }
  int64_t value = 0;
  if (!integer_attribute(api, info, "accuracy_level", value)) return 0;  // as for MatMulNBits, the default is float32 arithmetic
  if (value != 0 && value != 1 && value != 4) {
    throw InvalidLayer("accuracy_level: is " + std::to_string(value) + ", expected 0, 1 or 4");
  }
  return static_cast<int32_t>(value);
}

std::unique_ptr<Kernel> create(const Api& api, const OrtKernelInfo* info, Operator kind) {
  NodeLayer node;
  read_layer(api, info, kind, node);
  const bool gathers = kind == Operator::kGather;
  auto kernel = std::make_unique<Kernel>(Kernel{api, kind, nullptr, gathers ? 0 : accuracy_level(api, info), {}, 0, {}, nullptr});
  kernel->layer = make_layer(node.desc, gathers ? LayerUse::kGather : LayerUse::kAny);
  if (!gathers) kernel->outputs = read_outputs(api, info, kind, kernel->layer->view.out_features);
  if (kind == Operator::kMatMulAddNorm) {
    kernel->epsilon = read_epsilon(api, info);
    kernel->norm_weight = constant_norm_weight(api, info, kernel->outputs[0]);
  }
  if (kind == Operator::kMatMulRotary) kernel->rotary = read_rotary(api, info, kernel->outputs);
  return kernel;
}

void multiply(const Kernel& kernel, OrtKernelContext* context) {
  const claq_layer& layer = *kernel.layer;
  const MatMulTensors t = matmul_tensors(kernel.api, context, kernel.kind, layer.view.in_features, kernel.outputs, kernel.rotary,
                                         kernel.norm_weight);
  const auto dtype = static_cast<claq_dtype>(t.type);
  with_session_threads(kernel.api, context, [&](const Host& host) {
    switch (kernel.kind) {
      case Operator::kMatMulAdd:
      case Operator::kMatMulAddNorm:
        run_add(layer, dtype, kernel.accuracy_level, t.x, t.rows, t.residual, {t.norm_weight, kernel.epsilon, t.y[1]}, t.y[0], host);
        break;
      case Operator::kMatMulRotary:
      case Operator::kMatMulSplit:
        run_split(layer, dtype, kernel.accuracy_level, t.x, t.rows, kernel.outputs, t.rotary, t.y, host);
        break;
      case Operator::kMatMulSwiGlu: run_swiglu(layer, dtype, kernel.accuracy_level, t.x, t.rows, t.y[0], host); break;
      default: run(layer, dtype, kernel.accuracy_level, t.x, t.rows, t.y[0], host);
    }
  });
}

void gather_rows(const Kernel& kernel, OrtKernelContext* context) {
  const Api& api = kernel.api;
  const OrtValue* like = nullptr;
  check(api.input(context, kLike, &like));
  const GatherTensors tensors = gather_tensors(api, context, kernel.layer->view.in_features);
  try {
    with_session_threads(api, context, [&](const Host& host) {
      gather(*kernel.layer, static_cast<claq_dtype>(tensors.index_type), tensors.indices, tensors.count,
             static_cast<claq_dtype>(describe(api, like, "like").type), tensors.y, host.parallel_for, host.context);
    });
  } catch (const InvalidArgument& error) {
    throw InvalidArgument(std::string("ClaqGather: ") + error.what());
  }
}

TypedOp make_op(Operator kind, int first, int activation, int order, int outlier_index) {
  TypedOp op = describe_op([](const CustomOp*) { return "CPUExecutionProvider"; }, kind, first, activation, order, outlier_index);
  op.CreateKernelV2 = [](const CustomOp* self, const OrtApi* table, const OrtKernelInfo* info, void** out) {
    const Api api(table);
    return make_kernel(api, info, operator_name(typed(self).kind), out, [&] { return create(api, info, typed(self).kind).release(); });
  };
  if (kind == Operator::kGather) {
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

}  // namespace

const std::vector<TypedOp>& cpu_ops() {
  static const auto* ops = [] {
    auto* list = new std::vector<TypedOp>;
    for (const int activation : {kFloat32, kFloat16, kBfloat16}) {
      for (const int order : {kUint16, kInt32}) {
        for (const int outlier_index : {kUint16, kInt32}) {
          for (const Operator kind : kProducts) list->push_back(make_op(kind, activation, activation, order, outlier_index));
          for (const int index : {kInt32, kInt64}) list->push_back(make_op(Operator::kGather, index, activation, order, outlier_index));
        }
      }
    }
    return list;
  }();
  return *ops;
}

}  // namespace claq::ort
