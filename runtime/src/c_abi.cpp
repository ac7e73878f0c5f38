// The C interface of layers on the CPU, of attention and of quantization.
#include "attention/attention.h"
#include "claq.h"
#include "family.h"
#include "gather.h"
#include "guarded.h"
#include "layer.h"
#include "quantize/quantize.h"
#include "run.h"

using claq::guarded;

namespace {

// The threads of an OpenMP team spin for a while between two regions.
claq::Host host_of(claq_parallel_for parallel_for, void* context) {
  return {parallel_for, context, parallel_for == claq_openmp_parallel_for ? claq::kAwakeTaskSeconds : claq::kTaskSeconds};
}

}  // namespace

claq_status claq_create(const claq_layer_desc* desc, claq_layer** layer, char* error, size_t error_size) {
  return guarded(error, error_size, [&] {
    if (!layer) throw claq::InvalidArgument("layer: is null");
    *layer = nullptr;
    if (!desc || desc->struct_size != sizeof(claq_layer_desc)) {
      throw claq::InvalidArgument("desc: struct_size is not that of this version of libclaq");
    }
    *layer = claq::make_layer(*desc).release();
  });
}

claq_status claq_run(const claq_layer* layer, claq_dtype dtype, int32_t accuracy_level, const void* x, int64_t rows, void* y,
                     claq_parallel_for parallel_for, void* context, char* error, size_t error_size) {
  return guarded(error, error_size, [&] {
    if (!layer) throw claq::InvalidArgument("layer: is null");
    claq::run(*layer, dtype, accuracy_level, x, rows, y, host_of(parallel_for, context));
  });
}

claq_status claq_gather(const claq_layer* layer, claq_dtype index_dtype, const void* indices, int64_t count, claq_dtype dtype,
                        void* y, claq_parallel_for parallel_for, void* context, char* error, size_t error_size) {
  return guarded(error, error_size, [&] {
    if (!layer) throw claq::InvalidArgument("layer: is null");
    claq::gather(*layer, index_dtype, indices, count, dtype, y, parallel_for, context);
  });
}

void claq_destroy(claq_layer* layer) { delete layer; }

claq_status claq_attend(const claq_attention_desc* desc, claq_parallel_for parallel_for, void* context, char* error,
                        size_t error_size) {
  return guarded(error, error_size, [&] {
    if (!desc || desc->struct_size != sizeof(claq_attention_desc)) {
      throw claq::InvalidArgument("desc: struct_size is not that of this version of libclaq");
    }
    claq::attend(*desc, claq::choose_attention_loops(), host_of(parallel_for, context));
  });
}

claq_status claq_quantize_columns(const claq_columns_desc* desc, claq_parallel_for parallel_for, void* context, char* error,
                                  size_t error_size) {
  return guarded(error, error_size, [&] {
    if (!desc) throw claq::InvalidArgument("desc: is null");
    claq::quantize::quantize_columns(*desc, {parallel_for, context});
  });
}

claq_status claq_profile_columns(const claq_profile_desc* desc, claq_parallel_for parallel_for, void* context, char* error,
                                 size_t error_size) {
  return guarded(error, error_size, [&] {
    if (!desc) throw claq::InvalidArgument("desc: is null");
    claq::quantize::profile_columns(*desc, {parallel_for, context});
  });
}

const char* claq_layer_kernel(const claq_layer* layer) { return layer ? layer->family->name : ""; }

const char* claq_kernels(void) { return claq::family_names(); }

const char* claq_version(void) { return CLAQ_VERSION; }
