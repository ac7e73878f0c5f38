// float16 numbers in memory as vectors of CLAQ_LANES floats, beside vectors.h and free of C++ library code as it is. Wide vectors are
// compiled for CPUs that convert them in hardware.
#pragma once

#include <cstdint>
#include <cstring>

#if CLAQ_LANES > 4
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#else
#include "half.h"
#endif

#include "vectors.h"

namespace claq {
namespace {

#if CLAQ_LANES == 16
typedef __m256i HalfVector;
inline __m512 widened(HalfVector some) { return _mm512_cvtph_ps(some); }
inline HalfVector narrowed(__m512 some) { return _mm512_cvtps_ph(some, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
typedef __m512 Intrinsic;
#elif CLAQ_LANES == 8
typedef __m128i HalfVector;
inline __m256 widened(HalfVector some) { return _mm256_cvtph_ps(some); }
inline HalfVector narrowed(__m256 some) { return _mm256_cvtps_ph(some, _MM_FROUND_TO_NEAREST_INT); }
typedef __m256 Intrinsic;
#elif defined(__aarch64__)
typedef float16x4_t HalfVector;
inline float32x4_t widened(HalfVector some) { return vcvt_f32_f16(some); }
inline HalfVector narrowed(float32x4_t some) { return vcvt_f16_f32(some); }
typedef float32x4_t Intrinsic;
#else
struct HalfVector {
  uint16_t lanes[CLAQ_LANES];
};
inline Vector widened(HalfVector some) {
  Vector wide;
  for (int i = 0; i < CLAQ_LANES; ++i) wide[i] = half_to_float(some.lanes[i]);
  return wide;
}
inline HalfVector narrowed(Vector some) {
  HalfVector narrow;
  for (int i = 0; i < CLAQ_LANES; ++i) narrow.lanes[i] = float_to_half(some[i]);
  return narrow;
}
typedef Vector Intrinsic;
#endif

inline Vector load(const uint16_t* from) {
  HalfVector half;
  std::memcpy(&half, from, sizeof half);
  const Intrinsic wide = widened(half);
  Vector value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

inline void store(uint16_t* to, Vector value) {
  Intrinsic wide;
  std::memcpy(&wide, &value, sizeof wide);
  const HalfVector half = narrowed(wide);
  std::memcpy(to, &half, sizeof half);
}

inline float load_one(const uint16_t* from) {
  uint16_t padded[CLAQ_LANES] = {*from};
  return load(padded)[0];
}

inline void store_one(uint16_t* to, float value) {
  uint16_t padded[CLAQ_LANES];
  store(padded, value - Vector{});
  *to = padded[0];
}

inline float load_one(const float* from) { return *from; }

}  // namespace
}  // namespace claq
