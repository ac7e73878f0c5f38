// The C interface of the GPU layers: what ort/cuda_ops.cpp does inside ONNX Runtime, for any other host.
#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "../guarded.h"
#include "layer.h"
#include "status.h"
#include "table.h"

struct claq_cuda_layer {
  const claq::cuda::Driver& driver = claq::cuda::Driver::get();
  const claq::cuda::Context context = driver.current();
  std::vector<void*> owned;  // of that context
  std::unique_ptr<claq::cuda::Layer> layer;
  std::unique_ptr<claq::cuda::Table> table;

  ~claq_cuda_layer() {
    // The thread may have another context, or none. One that is gone has taken its memory along.
    if (owned.empty() || !driver.push(context)) return;
    for (void* memory : owned) driver.release(memory);
    driver.pop();
  }
};

claq_status claq_cuda_usable(char* text, size_t text_size) {
  return claq::guarded(text, text_size, [&] {
    std::string found;
    if (!claq::cuda::usable(found)) throw claq::cuda::Error(found);
    if (text && text_size) std::snprintf(text, text_size, "%s", found.c_str());
  });
}

claq_status claq_cuda_create(const claq_layer_desc* desc, claq_dtype dtype, claq_cuda_layer** layer, char* error, size_t error_size) {
  return claq::guarded(error, error_size, [&] {
    if (!layer) throw claq::InvalidArgument("layer: is null");
    *layer = nullptr;
    if (!desc || desc->struct_size != sizeof(claq_layer_desc)) {
      throw claq::InvalidArgument("desc: struct_size is not that of this version of libclaq");
    }
    auto made = std::make_unique<claq_cuda_layer>();
    const claq::cuda::Allocate allocate = [&](size_t bytes) {
      made->owned.push_back(made->driver.allocate(bytes));
      return made->owned.back();
    };
    const claq::cuda::Tensors tensors(*desc, dtype, allocate);
    made->layer = std::make_unique<claq::cuda::Layer>(tensors, allocate);
    made->table = std::make_unique<claq::cuda::Table>(tensors);
    *layer = made.release();
  });
}

size_t claq_cuda_workspace(const claq_cuda_layer* layer, int64_t rows, int has_cublas) {
  return layer ? layer->layer->workspace(rows, has_cublas != 0) : 0;
}

claq_status claq_cuda_run(const claq_cuda_layer* layer, const void* x, int64_t rows, void* y, void* workspace, void* stream,
                          void* cublas, char* error, size_t error_size) {
  return claq::guarded(error, error_size, [&] {
    if (!layer) throw claq::InvalidArgument("layer: is null");
    layer->layer->run(x, rows, y, workspace, stream, cublas);
  });
}

claq_status claq_cuda_gather(const claq_cuda_layer* layer, claq_dtype index_dtype, const void* indices, int64_t count, void* y,
                             void* stream, char* error, size_t error_size) {
  return claq::guarded(error, error_size, [&] {
    if (!layer) throw claq::InvalidArgument("layer: is null");
    layer->table->run(index_dtype, indices, count, y, stream);
  });
}

void claq_cuda_destroy(claq_cuda_layer* layer) { delete layer; }
