// ClaqMatMul on NVIDIA GPUs: the session's stream and memory around cuda::Layer. ClaqGather has no GPU kernel; ONNX Runtime
// runs it on the CPU and copies the rows.
#include <memory>
#include <string>
#include <vector>

#include "../cuda/layer.h"
#include "operator.h"

namespace claq::ort {
namespace {

class Kernel {
 public:
  Kernel(const Api& api, const OrtKernelInfo* info, int activation) : api_(api) {
    check(api.allocator(info, &allocator_));
    try {
      NodeLayer node;
      read_layer(api, info, false, node);
      layer_ = std::make_unique<cuda::Layer>(node.desc, static_cast<claq_dtype>(activation), [this](size_t bytes) {
        void* memory = allocator_->Alloc(allocator_, bytes);
        if (!memory) throw cuda::Error("not enough memory on the GPU");
        owned_.push_back(memory);
        return memory;
      });
    } catch (...) {
      release();
      throw;
    }
  }
  ~Kernel() { release(); }
  Kernel(const Kernel&) = delete;
  Kernel& operator=(const Kernel&) = delete;

  const Api& api() const { return api_; }

  void compute(OrtKernelContext* context) const {
    const MatMulTensors tensors = matmul_tensors(api_, context, layer_->in_features(), layer_->out_features());
    void *stream = nullptr, *cublas = nullptr;
    check(api_.stream(context, &stream));
    if (OrtStatus* status = api_.resource(context, kCublasHandle, &cublas)) {
      api_.release_status(status);  // an execution provider without cuBLAS: many rows take another kernel
      cublas = nullptr;
    }
    const size_t bytes = layer_->workspace(tensors.rows, cublas != nullptr);
    if (bytes == 0) return;
    void* memory = nullptr;
    check(api_.scratch(context, allocator_->Info(allocator_), bytes, &memory));
    // The arena hands the memory out again only to work that the stream runs later.
    const auto free = [this](void* scratch) { allocator_->Free(allocator_, scratch); };
    const std::unique_ptr<void, decltype(free)> scratch(memory, free);
    layer_->run(tensors.x, tensors.rows, tensors.y, memory, stream, cublas);
  }

 private:
  void release() noexcept {
    layer_.reset();
    for (void* memory : owned_) allocator_->Free(allocator_, memory);
    api_.release_allocator(allocator_);
  }

  Api api_;
  OrtAllocator* allocator_ = nullptr;
  std::vector<void*> owned_;
  std::unique_ptr<cuda::Layer> layer_;
};

// What a kernel is made with: the functions of an operator get no other table than that of the operator's own version.
const Api* newer_api = nullptr;

TypedOp make_op(int activation, int order, int outlier_index) {
  TypedOp op =
      describe_op([](const CustomOp*) { return "CUDAExecutionProvider"; }, false, activation, activation, order, outlier_index);
  op.CreateKernelV2 = [](const CustomOp* self, const OrtApi*, const OrtKernelInfo* info, void** out) {
    *out = nullptr;
    return guarded(*newer_api, [&] {
      try {
        *out = new Kernel(*newer_api, info, typed(self).activation);
      } catch (const InvalidLayer& error) {
        throw InvalidLayer("ClaqMatMul node '" + node_name(*newer_api, info) + "': " + error.what());
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
        for (const int outlier_index : {kUint16, kInt32}) list->push_back(make_op(activation, order, outlier_index));
      }
    }
    return list;
  }();
  return *ops;
}

}  // namespace claq::ort
