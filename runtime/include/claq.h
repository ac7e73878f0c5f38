/* C interface of libclaq: linear layers in the claq format (docs/format.md), y = x W^T + b.
 *
 * Every function is thread-safe. No function throws; failures are return codes with a message. The memory behind the
 * tensors of a layer is read in place and must outlive the layer. */
#ifndef CLAQ_H_
#define CLAQ_H_

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define CLAQ_API
#else
#define CLAQ_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef enum claq_dtype {
  CLAQ_FLOAT32 = 1,
  CLAQ_INT8 = 3,
  CLAQ_UINT16 = 4,
  CLAQ_INT32 = 6,
  CLAQ_FLOAT16 = 10,
  CLAQ_UINT32 = 12,
  CLAQ_BFLOAT16 = 16
} claq_dtype; /* the numbers of ONNX's TensorProto.DataType */

typedef enum claq_status { CLAQ_OK = 0, CLAQ_INVALID_LAYER = 1, CLAQ_INVALID_ARGUMENT = 2, CLAQ_INTERNAL_ERROR = 3 } claq_status;

/* A dense tensor in row-major order. `shape` has `rank` entries and is read during claq_create only. */
typedef struct claq_tensor {
  const void* data;
  const int64_t* shape;
  int32_t rank;
  int32_t dtype; /* claq_dtype */
} claq_tensor;

/* One layer as docs/format.md describes it. An absent part is a tensor of one dimension of length 0. */
typedef struct claq_layer_desc {
  size_t struct_size; /* sizeof(claq_layer_desc) */
  int64_t in_features;
  int64_t out_features;
  int64_t columns_4;
  int64_t columns_3;
  int64_t columns_2;
  claq_tensor codes;
  claq_tensor codebook;
  claq_tensor scale;
  claq_tensor row_scale;
  claq_tensor order;
  claq_tensor outlier_ptr;
  claq_tensor outlier_index;
  claq_tensor outlier_value;
  claq_tensor bias;   /* float32, float16 or bfloat16 */
  const char* kernel; /* a name of claq_kernels(), or NULL: CLAQ_KERNEL of the environment, else the best one here */
} claq_layer_desc;

typedef struct claq_layer claq_layer;

/* Calls task(data, i) for every i in [0, total), in any order, from any threads, and returns when all calls have. */
typedef void (*claq_parallel_for)(void* context, void (*task)(void* data, size_t index), size_t total, void* data);

/* Checks every statement of the format about the descriptor's tensors (not the codes, each of which is valid) and makes a
 * layer. On failure `*layer` is NULL and `error` (of `error_size` bytes, may be NULL) holds a message that names the
 * tensor and what was expected. */
CLAQ_API claq_status claq_create(const claq_layer_desc* desc, claq_layer** layer, char* error, size_t error_size);

/* y[rows, out_features] = layer(x[rows, in_features]); both contiguous, both of type `dtype` (float32, float16, bfloat16).
 * accuracy_level: 0 or 1 = float32 arithmetic, 4 = activations rounded to int8. `parallel_for` may be NULL (serial). */
CLAQ_API claq_status claq_run(const claq_layer* layer, claq_dtype dtype, int32_t accuracy_level, const void* x, int64_t rows,
                              void* y, claq_parallel_for parallel_for, void* context, char* error, size_t error_size);

CLAQ_API void claq_destroy(claq_layer* layer);

/* Name of the kernel family that the layer uses. */
CLAQ_API const char* claq_layer_kernel(const claq_layer* layer);

/* Names of the kernel families that this CPU can run, best first, separated by spaces. */
CLAQ_API const char* claq_kernels(void);

CLAQ_API const char* claq_version(void);

/* A claq_parallel_for on threads of libclaq, for hosts without a pool of their own (ONNX Runtime has one and never comes
 * here). `context` is the number of threads to use, cast to a pointer. Threads are started at the first call. */
CLAQ_API void claq_pool_parallel_for(void* context, void (*task)(void* data, size_t index), size_t total, void* data);

#ifdef __cplusplus
}
#endif

#endif
