// A stand-in for cuBLAS: cublasGemmEx for matrices that are not transposed, sums in double.
#include <cstdint>
#include <cstring>

namespace {

float bits(uint32_t value) {
  float number;
  std::memcpy(&number, &value, sizeof number);
  return number;
}

float read(const void* from, int64_t at, int type) {
  if (type == 0) return static_cast<const float*>(from)[at];
  const uint16_t half = static_cast<const uint16_t*>(from)[at];
  if (type == 14) return bits(static_cast<uint32_t>(half) << 16);
  return static_cast<float>(reinterpret_cast<const _Float16*>(from)[at]);
}

void write(void* to, int64_t at, int type, float value) {
  if (type == 0) {
    static_cast<float*>(to)[at] = value;
  } else if (type == 2) {
    static_cast<_Float16*>(to)[at] = static_cast<_Float16>(value);
  } else {
    uint32_t whole;
    std::memcpy(&whole, &value, sizeof whole);
    static_cast<uint16_t*>(to)[at] = static_cast<uint16_t>((whole + 0x7fff + ((whole >> 16) & 1)) >> 16);
  }
}

int calls = 0;
int compute = 0;

}  // namespace

extern "C" int fake_cublas_calls() { return calls; }

// The cublasComputeType_t of the last product since this was last called, or 0.
extern "C" int fake_cublas_compute() {
  const int last = compute;
  compute = 0;
  return last;
}

extern "C" int cublasGemmEx(void*, int transpose_a, int transpose_b, int m, int n, int k, const void* alpha, const void* a, int a_type,
                            int lda, const void* b, int b_type, int ldb, const void* beta, void* c, int c_type, int ldc, int compute_type,
                            int) {
  ++calls;
  compute = compute_type;
  if (transpose_a || transpose_b) return 7;  // CUBLAS_STATUS_INVALID_VALUE
  for (int j = 0; j < n; ++j) {
    for (int i = 0; i < m; ++i) {
      double sum = 0;
      for (int l = 0; l < k; ++l) {
        sum += static_cast<double>(read(a, i + int64_t{l} * lda, a_type)) * read(b, l + int64_t{j} * ldb, b_type);
      }
      const int64_t at = i + int64_t{j} * ldc;
      const double old = *static_cast<const float*>(beta) * read(c, at, c_type);
      write(c, at, c_type, static_cast<float>(*static_cast<const float*>(alpha) * sum + old));
    }
  }
  return 0;
}
