// Vectors of 4 and of 8 floats: a line of transposed activations, one column's in as many rows of x.
//
// Included only by files that are compiled for AVX2 and FMA or more; see avx2_common.h.
#pragma once

#include <immintrin.h>

namespace claq {
namespace {

template <int kRows>
struct Line;

template <>
struct Line<4> {
  using Type = __m128;
  static Type zero() { return _mm_setzero_ps(); }
  static Type set(float v) { return _mm_set1_ps(v); }
  static Type load(const float* p) { return _mm_load_ps(p); }
  static void store(float* p, Type v) { _mm_store_ps(p, v); }
  static Type add(Type a, Type b) { return _mm_add_ps(a, b); }
  static Type add_product(Type a, Type b, Type sum) { return _mm_fmadd_ps(a, b, sum); }
  static void add_to(float* sum, Type v) { _mm_storeu_ps(sum, _mm_add_ps(_mm_loadu_ps(sum), v)); }
};

template <>
struct Line<8> {
  using Type = __m256;
  static Type zero() { return _mm256_setzero_ps(); }
  static Type set(float v) { return _mm256_set1_ps(v); }
  static Type load(const float* p) { return _mm256_load_ps(p); }
  static void store(float* p, Type v) { _mm256_store_ps(p, v); }
  static Type add(Type a, Type b) { return _mm256_add_ps(a, b); }
  static Type add_product(Type a, Type b, Type sum) { return _mm256_fmadd_ps(a, b, sum); }
  static void add_to(float* sum, Type v) { _mm256_storeu_ps(sum, _mm256_add_ps(_mm256_loadu_ps(sum), v)); }
};

}  // namespace
}  // namespace claq
