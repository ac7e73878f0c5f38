// The operators on NVIDIA GPUs: the session's stream and memory around cuda::Layer, cuda::Table and what follows a product.
#include <memory>
#include <string>
#include <variant>
#include <vector>

#include "../cuda/epilogue.h"
#include "../cuda/layer.h"
#include "../cuda/table.h"
#include "operator.h"

namespace claq::ort {
namespace {

// Memory of the node's device, held as long as the node.
class Memory {
 public:
  Memory(const Api& api, const OrtKernelInfo* info) : api_(api) { check(api.allocator(info, &allocator_)); }
  ~Memory() {
    for (void* memory : owned_) allocator_->Free(allocator_, memory);
    api_.release_allocator(allocator_);
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  cuda::Allocate taker() {
    return [this](size_t bytes) {
      void* memory = allocator_->Alloc(allocator_, bytes);
      if (!memory) throw cuda::Error("not enough memory on the GPU");
      owned_.push_back(memory);
      return memory;
    };
  }
  OrtAllocator* allocator() const { return allocator_; }

 private:
  Api api_;
  OrtAllocator* allocator_ = nullptr;
  std::vector<void*> owned_;
};

cuda::Tensors tensors_of(const Api& api, const OrtKernelInfo* info, const TypedOp& op, Memory& memory) {
  NodeLayer node;
  read_layer(api, info, op.kind, node);
  return cuda::Tensors(node.desc, static_cast<claq_dtype>(op.activation), memory.taker());
}

constexpr size_t kAlignment = 256;  // of the parts of a node's scratch memory

// Two parts are turned, the third is taken as it is.
struct Rotation {
  cuda::Turn turn;
  cuda::Take take;
  Rotary rotary;
};

// What is done with a product.
using Epilogue = std::variant<std::monostate, cuda::Add, cuda::AddNorm, cuda::SwiGlu, cuda::Take, Rotation>;

Epilogue make_epilogue(const Api& api, const OrtKernelInfo* info, Operator kind, const cuda::Tensors& tensors, const Outputs& outputs) {
  switch (kind) {
    case Operator::kMatMulRotary: return Rotation{cuda::Turn(tensors), cuda::Take(tensors), read_rotary(api, info, outputs)};
    case Operator::kMatMulAdd: return cuda::Add(tensors);
    case Operator::kMatMulAddNorm: return cuda::AddNorm(tensors, read_epsilon(api, info));
    case Operator::kMatMulSwiGlu: return cuda::SwiGlu(tensors);
    case Operator::kMatMulSplit: return cuda::Take(tensors);
    default: return {};
  }
}

class MatMul {
 public:
  MatMul(const Api& api, const OrtKernelInfo* info, const TypedOp& op)
      : api_(api),
        kind_(op.kind),
        memory_(api, info),
        layer_(tensors_of(api, info, op, memory_), memory_.taker()),
        outputs_(read_outputs(api, info, op.kind, layer_.tensors().out_features)),
        epilogue_(make_epilogue(api, info, op.kind, layer_.tensors(), outputs_)) {}

  const Api& api() const { return api_; }

  void compute(OrtKernelContext* context) const {
    const cuda::Tensors& layer = layer_.tensors();
    const auto* rotation = std::get_if<Rotation>(&epilogue_);
    const MatMulTensors tensors =
        matmul_tensors(api_, context, kind_, layer.in_features, outputs_, rotation ? rotation->rotary : Rotary{}, nullptr);
    void *stream = nullptr, *cublas = nullptr;
    check(api_.stream(context, &stream));
    if (OrtStatus* status = api_.resource(context, kCublasHandle, &cublas)) {
      api_.release_status(status);  // an execution provider without cuBLAS: many rows take another kernel
      cublas = nullptr;
    }
    size_t bytes = layer_.workspace(tensors.rows, cublas != nullptr);
    if (bytes == 0) return;
    bytes = (bytes + kAlignment - 1) / kAlignment * kAlignment;
    // A product that is not the result lies behind the layer's own memory.
    const bool apart = kind_ == Operator::kMatMulSwiGlu || kind_ == Operator::kMatMulSplit || kind_ == Operator::kMatMulRotary;
    const size_t product_bytes = apart ? static_cast<size_t>(tensors.rows * layer.out_features) * size_of(layer.dtype) : 0;
    OrtAllocator* allocator = memory_.allocator();
    void* workspace = nullptr;
    check(api_.scratch(context, allocator->Info(allocator), bytes + product_bytes, &workspace));
    // The arena hands the memory out again only to work that the stream runs later.
    const auto free = [allocator](void* scratch) { allocator->Free(allocator, scratch); };
    const std::unique_ptr<void, decltype(free)> scratch(workspace, free);
    void* product = apart ? static_cast<char*>(workspace) + bytes : tensors.y[0];
    layer_.run(tensors.x, tensors.rows, product, workspace, stream, cublas);
    finish(tensors, product, stream);
  }

 private:
  void finish(const MatMulTensors& tensors, const void* product, void* stream) const {
    const int64_t rows = tensors.rows, width = layer_.tensors().out_features;
    if (const auto* add = std::get_if<cuda::Add>(&epilogue_)) add->run(tensors.residual, tensors.y[0], rows * width, stream);
    if (const auto* norm = std::get_if<cuda::AddNorm>(&epilogue_)) {
      norm->run(tensors.residual, tensors.norm_weight, tensors.y[0], tensors.y[1], rows, width, stream);
    }
    if (const auto* swiglu = std::get_if<cuda::SwiGlu>(&epilogue_)) swiglu->run(product, rows, width / 2, tensors.y[0], stream);
    const auto* rotation = std::get_if<Rotation>(&epilogue_);
    const cuda::Take* take = rotation ? &rotation->take : std::get_if<cuda::Take>(&epilogue_);
    if (!take) return;
    int64_t first = 0;
    for (size_t i = 0; i < kMostParts; first += outputs_[i], ++i) {
      if (rotation && i < rotation->rotary.heads.size()) {
        const Rotary& rotary = tensors.rotary;
        rotation->turn.run(product, rows, width, first, outputs_[i], rotary.cos, rotary.sin, outputs_[i] / rotary.heads[i], rotary.half,
                           tensors.y[i], stream);
      } else {
        take->run(product, rows, width, first, outputs_[i], tensors.y[i], stream);
      }
    }
  }

  Api api_;
  Operator kind_;
  Memory memory_;
  cuda::Layer layer_;
  Outputs outputs_;
  Epilogue epilogue_;
};

class Gather {
 public:
  Gather(const Api& api, const OrtKernelInfo* info, const TypedOp& op)
      : api_(api), memory_(api, info), table_(tensors_of(api, info, op, memory_)) {}

  const Api& api() const { return api_; }

  void compute(OrtKernelContext* context) const {
    const GatherTensors tensors = gather_tensors(api_, context, table_.in_features());
    void* stream = nullptr;
    check(api_.stream(context, &stream));
    table_.run(static_cast<claq_dtype>(tensors.index_type), tensors.indices, tensors.count, tensors.y, stream);
  }

 private:
  Api api_;
  Memory memory_;
  cuda::Table table_;
};

template <class Kernel>
TypedOp make_op(Operator kind, int first, int activation, int order, int outlier_index) {
  TypedOp op =
      describe_op([](const CustomOp*) { return "CUDAExecutionProvider"; }, kind, first, activation, order, outlier_index);
  op.version = kOrtCudaApiVersion;  // the version of the table that a kernel is made with
  op.CreateKernelV2 = [](const CustomOp* self, const OrtApi* table, const OrtKernelInfo* info, void** out) {
    const Api api(table);
    return make_kernel(api, info, operator_name(typed(self).kind), out, [&] { return new Kernel(api, info, typed(self)); });
  };
  op.KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
    const Kernel& self = *static_cast<const Kernel*>(kernel);
    return guarded(self.api(), [&] { self.compute(context); });
  };
  op.KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  return op;
}

}  // namespace

const std::vector<TypedOp>& cuda_ops() {
  static const auto* ops = [] {
    auto* list = new std::vector<TypedOp>;
    for (const int activation : {kFloat32, kFloat16, kBfloat16}) {
      for (const int order : {kUint16, kInt32}) {
        for (const int outlier_index : {kUint16, kInt32}) {
          for (const Operator kind : kProducts) list->push_back(make_op<MatMul>(kind, activation, activation, order, outlier_index));
          for (const int index : {kInt32, kInt64}) list->push_back(make_op<Gather>(Operator::kGather, index, activation, order, outlier_index));
        }
      }
    }
    return list;
  }();
  return *ops;
}

}  // namespace claq::ort
