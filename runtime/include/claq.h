/* C interface of libclaq: layers in the claq format (docs/format.md), as linear maps y = x W^T + b and as embedding tables.
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
  CLAQ_INT64 = 7,
  CLAQ_FLOAT16 = 10,
  CLAQ_UINT32 = 12,
  CLAQ_BFLOAT16 = 16
} claq_dtype; /* the numbers of ONNX's TensorProto.DataType */

typedef enum claq_status { CLAQ_OK = 0, CLAQ_INVALID_LAYER = 1, CLAQ_INVALID_ARGUMENT = 2, CLAQ_INTERNAL_ERROR = 3, CLAQ_UNAVAILABLE = 4 } claq_status;

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

/* y[count, in_features] = the rows of the layer's weight W[out_features, in_features] that `indices` names, as an embedding
 * looks them up; an index below 0 counts from the end. `index_dtype` is int32 or int64, `dtype` that of y (float32, float16,
 * bfloat16). Both arrays are contiguous; the layer's bias is not used. */
CLAQ_API claq_status claq_gather(const claq_layer* layer, claq_dtype index_dtype, const void* indices, int64_t count,
                                 claq_dtype dtype, void* y, claq_parallel_for parallel_for, void* context, char* error,
                                 size_t error_size);

CLAQ_API void claq_destroy(claq_layer* layer);

/* Name of the kernel family that the layer uses. */
CLAQ_API const char* claq_layer_kernel(const claq_layer* layer);

/* Names of the kernel families that this CPU can run, best first, separated by spaces. */
CLAQ_API const char* claq_kernels(void);

CLAQ_API const char* claq_version(void);

/* A claq_parallel_for on threads of libclaq, for hosts without a pool of their own (ONNX Runtime has one and never comes
 * here). `context` is the number of threads to use, cast to a pointer. Threads are started at the first call. */
CLAQ_API void claq_pool_parallel_for(void* context, void (*task)(void* data, size_t index), size_t total, void* data);

/* A claq_parallel_for on the threads of an OpenMP runtime that the host has loaded, such as PyTorch's: two sets of threads that
 * wait by spinning would take each other's processors. `context` points to a claq_openmp, libclaq itself is linked with none. */
typedef struct claq_openmp {
  /* GOMP_parallel of libgomp, which LLVM's and Intel's runtimes have too: calls body(data) on each thread of a team. */
  void (*parallel)(void (*body)(void*), void* data, unsigned threads, unsigned flags);
  unsigned threads; /* of the team; as many as the host's own, since a team that changes its size starts and ends threads */
} claq_openmp;
CLAQ_API void claq_openmp_parallel_for(void* context, void (*task)(void* data, size_t index), size_t total, void* data);

/* ---- attention ---------------------------------------------------------------------------------------------------------
 *
 * y = softmax(scale * query key^T + mask) value, all contiguous, where query head h reads key and value head
 * h / (heads / kv_heads). The keys are `past` cached ones and `tokens` - `past` new ones. The cache is float32 or float16, all else
 * float32; new keys and values are rounded to float16 before they are used then, as they will be when they are cached. */

typedef struct claq_attention_desc {
  size_t struct_size; /* sizeof(claq_attention_desc) */
  int64_t batch;
  int64_t heads;
  int64_t kv_heads;
  int64_t rows;   /* queries of each head */
  int64_t tokens; /* keys of each head, cached ones included */
  int64_t past;   /* cached ones, the first of them */
  int64_t key_size;
  int64_t value_size;
  float scale;
  const float* query;      /* [batch, rows, heads, key_size] */
  const float* key;        /* [batch, tokens - past, kv_heads, key_size] */
  const float* value;      /* [batch, tokens - past, kv_heads, value_size] */
  const float* mask;       /* row [b, h, r] begins at mask + b * mask_batch + h * mask_head + r * mask_row; NULL: nothing is added */
  int64_t mask_batch;
  int64_t mask_head;
  int64_t mask_row;
  int32_t cache_dtype;     /* claq_dtype of the next two and of present_key and present_value: float32 or float16 */
  const void* past_key;    /* [batch, kv_heads, past, key_size]; NULL where past is 0 */
  const void* past_value;  /* [batch, kv_heads, past, value_size] */
  float* y;                /* out [batch, rows, heads, value_size] */
  void* present_key;       /* out [batch, kv_heads, tokens, key_size]: cached and new keys; NULL, as past is 0 then: not wanted */
  void* present_value;     /* out [batch, kv_heads, tokens, value_size] */
  int64_t capacity;        /* not 0: the cache has room for so many tokens, at least `tokens`, past and present alike: both are
                              [batch, kv_heads, capacity, size], of which the first `past` and `tokens` are read and written. Then
                              present_key may be past_key, and present_value past_value: cached tokens stay where they are. */
} claq_attention_desc;

/* Where a mask is lower than the largest of its row by 1e30 or more, the token has no weight and may not be read: values there that
 * are not finite may not reach y. A row without tokens gives zeros. `parallel_for` may be NULL (serial). */
CLAQ_API claq_status claq_attend(const claq_attention_desc* desc, claq_parallel_for parallel_for, void* context, char* error,
                                 size_t error_size);

/* ---- quantization ------------------------------------------------------------------------------------------------------
 *
 * The inner loops of the compiler (claq_export/algorithm), which describes every step; both give the same bits. All matrices
 * are contiguous float32 [columns, rows]: a line holds the weights of one column, that is of one input feature, divided by
 * their row scales. Results do not depend on the number of threads or on the kernel family. */

typedef enum claq_kmeans {
  CLAQ_KMEANS_LLOYD = 0,  /* Lloyd from a companded start */
  CLAQ_KMEANS_COARSE = 1, /* the optimum over 64 candidate borders, then Lloyd */
  CLAQ_KMEANS_OPTIMAL = 2 /* the optimum by dynamic programming */
} claq_kmeans;

typedef struct claq_columns_desc {
  size_t struct_size; /* sizeof(claq_columns_desc) */
  int64_t columns;
  int64_t rows;
  const int32_t* width;     /* [columns]: 2, 3 or 4 */
  const int64_t* reserve;   /* [columns]: weights to keep as outliers, less than rows */
  const double* row_weight; /* [rows]: what a row's squared error counts in the fit, finite and not negative; NULL = 1 */
  const double* start;      /* [columns, 16]: ascending centroids to run Lloyd from, 2^width of them used; NULL = the method's */
  const float* feedback;    /* [columns, columns]: feedback[i, j] of the error of column j is taken off column i > j before it
                               is quantized, and errors are divided by feedback[j, j]; NULL: columns on their own */
  int32_t method;           /* claq_kmeans */
  int32_t most_iterations;  /* Lloyd steps a column */
  int32_t both_sides;       /* outliers: 0 = the largest magnitudes, 1 = half from each end */
  int32_t fit_outliers;     /* 1 = outliers take part in the fit */
  const char* kernel;       /* as in claq_layer_desc */

  float* target;           /* in: the columns; out: with all feedback taken off */
  float* value;            /* out: what they decode to, outliers included */
  float* error;            /* out: (target - value) / feedback[j, j]; NULL without feedback */
  uint8_t* codes;          /* out [columns, rows] */
  int8_t* codebook;        /* out [columns, 16], ascending, zero beyond 2^width */
  uint16_t* scale;         /* out [columns]: float16 */
  int64_t* outliers;       /* out [columns]: how many are kept: what was asked for, or none where scale is 0 */
  int32_t* outlier_row;    /* out [sum of reserve]: column i's begin at the sum of reserve before it, ascending */
  uint16_t* outlier_extra; /* out, likewise: float16 to be added to the codebook entry */
  double* feedback_seconds; /* out: what of the time went into feedback; NULL: not wanted */
} claq_columns_desc;

/* Quantizes columns, one after the other where they feed back, else spread over threads. CLAQ_INVALID_ARGUMENT names what is
 * wrong, such as a value that is not finite; results are then undefined. `parallel_for` may be NULL (serial). */
CLAQ_API claq_status claq_quantize_columns(const claq_columns_desc* desc, claq_parallel_for parallel_for, void* context,
                                           char* error, size_t error_size);

typedef struct claq_profile_desc {
  size_t struct_size; /* sizeof(claq_profile_desc) */
  int64_t columns;
  int64_t rows;
  const float* target;     /* [columns, rows] */
  const int32_t* width;    /* [widths] */
  int64_t widths;
  const int64_t* reserve;  /* [reserves]: largest magnitudes that are left out, less than rows */
  int64_t reserves;
  int32_t most_iterations; /* Lloyd steps */
  const char* kernel;
  double* error; /* out [columns, widths, reserves]: summed squared distances to the fitted centroids */
} claq_profile_desc;

/* What each column would cost at several widths with several numbers of outliers: one sort for all of them. */
CLAQ_API claq_status claq_profile_columns(const claq_profile_desc* desc, claq_parallel_for parallel_for, void* context,
                                          char* error, size_t error_size);

/* ---- NVIDIA GPUs -------------------------------------------------------------------------------------------------
 * The Triton kernels of claq-export, compiled ahead of time and launched through the CUDA driver, which is looked up when
 * the first of these functions is called. Failures for want of a GPU, a driver or kernels are CLAQ_UNAVAILABLE. */

typedef struct claq_cuda_layer claq_cuda_layer;

/* CLAQ_OK if there is a GPU and every GPU of this machine has its kernels; `text` says what was found or what is missing.
 * Kernels are looked for in CLAQ_CUDA_KERNELS of the environment, else in the folder `cuda` beside this library. */
CLAQ_API claq_status claq_cuda_usable(char* text, size_t text_size);

/* As claq_create, for the calling thread's CUDA context: the data of `desc` are device memory, aligned to 16 bytes, which is
 * read in place and must outlive the layer. The type of x, y and the bias is `dtype`. Waits for the device. */
CLAQ_API claq_status claq_cuda_create(const claq_layer_desc* desc, claq_dtype dtype, claq_cuda_layer** layer, char* error,
                                      size_t error_size);

/* Bytes of device memory, aligned to 256, that claq_cuda_run needs for that many rows, with a cuBLAS handle or without. */
CLAQ_API size_t claq_cuda_workspace(const claq_cuda_layer* layer, int64_t rows, int has_cublas);

/* Queues y[rows, out_features] = layer(x[rows, in_features]) on a stream (CUstream or cudaStream_t) and returns; may be
 * captured in a CUDA graph. `cublas` is a cublasHandle_t set to that stream, or NULL: many rows are then slower.
 * Its functions are looked for once in a layer's life, in the cuBLAS that ONNX Runtime's CUDA provider depends on, else in the only
 * one this process has loaded; where there are several, the handle is not used. */
CLAQ_API claq_status claq_cuda_run(const claq_cuda_layer* layer, const void* x, int64_t rows, void* y, void* workspace, void* stream,
                                   void* cublas, char* error, size_t error_size);

/* Queues y[count, in_features] = the rows of the layer's weight that `indices` (int32 or int64, on the device) names on a
 * stream and returns; may be captured in a CUDA graph. y has the layer's type. An index below 0 counts from the end; one out
 * of range gives a row of NaN, as an error would have to wait for the GPU. */
CLAQ_API claq_status claq_cuda_gather(const claq_cuda_layer* layer, claq_dtype index_dtype, const void* indices, int64_t count,
                                      void* y, void* stream, char* error, size_t error_size);

/* From any thread, whatever its context; no run of the layer may be under way. */
CLAQ_API void claq_cuda_destroy(claq_cuda_layer* layer);

#ifdef __cplusplus
}
#endif

#endif
