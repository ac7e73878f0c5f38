// ClaqMatMul and ClaqGather on NVIDIA GPUs: the session's stream and memory around cuda::Layer and cuda::Table.
#include <memory>
#include <string>
#include <vector>

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

class MatMul {
 public:
  MatMul(const Api& api, const OrtKernelInfo* info, const TypedOp& op)
      : api_(api), memory_(api, info), layer_(tensors_of(api, info, op, memory_), memory_.taker()) {}

  const Api& api() const { return api_; }

  void compute(OrtKernelContext* context) const {
    const MatMulTensors tensors = matmul_tensors(api_, context, Operator::kMatMul, layer_.in_features(), {layer_.out_features(), -1, -1});
    void *stream = nullptr, *cublas = nullptr;
    check(api_.stream(context, &stream));
    if (OrtStatus* status = api_.resource(context, kCublasHandle, &cublas)) {
      api_.release_status(status);  // an execution provider without cuBLAS: many rows take another kernel
      cublas = nullptr;
    }
    const size_t bytes = layer_.workspace(tensors.rows, cublas != nullptr);
    if (bytes == 0) return;
    OrtAllocator* allocator = memory_.allocator();
    void* workspace = nullptr;
    check(api_.scratch(context, allocator->Info(allocator), bytes, &workspace));
    // The arena hands the memory out again only to work that the stream runs later.
    const auto free = [allocator](void* scratch) { allocator->Free(allocator, scratch); };
    const std::unique_ptr<void, decltype(free)> scratch(workspace, free);
    layer_.run(tensors.x, tensors.rows, tensors.y[0], workspace, stream, cublas);
  }

 private:
  Api api_;
  Memory memory_;
  cuda::Layer layer_;
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

// What a kernel is made with: the functions of an operator get no other table than that of the operator's own version.
const Api* newer_api = nullptr;

template <class Kernel>
TypedOp make_op(Operator kind, int first, int activation, int order, int outlier_index) {
  TypedOp op =
      describe_op([](const CustomOp*) { return "CUDAExecutionProvider"; }, kind, first, activation, order, outlier_index);
  op.CreateKernelV2 = [](const CustomOp* self, const OrtApi*, const OrtKernelInfo* info, void** out) {
    *out = nullptr;
    return guarded(*newer_api, [&] {
      try {
        *out = new Kernel(*newer_api, info, typed(self));
      } catch (const InvalidLayer& error) {
        throw InvalidLayer(std::string(operator_name(typed(self).kind)) + " node '" + node_name(*newer_api, info) + "': " + error.what());
      }
    });
  };
  op.KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
    const Kernel& self = *static_cast<const Kernel*>(kernel);
    return guarded(self.api(), [&] { self.compute(context); });
  };
  op.KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  return op;
}

}  // namespace

const std::vector<TypedOp>& cuda_ops(const Api& api) {
  static const auto* ops = [&api] {
    newer_api = new Api(api);
    auto* list = new std::vector<TypedOp>;
    for (const int activation : {kFloat32, kFloat16, kBfloat16}) {
      for (const int order : {kUint16, kInt32}) {
        for (const int outlier_index : {kUint16, kInt32}) {
          list->push_back(make_op<MatMul>(Operator::kMatMul, activation, activation, order, outlier_index));
          for (const int index : {kInt32, kInt64}) list->push_back(make_op<Gather>(Operator::kGather, index, activation, order, outlier_index));
        }
      }
    }
    return list;
  }();
  return *ops;
}

}  // namespace claq::ort
