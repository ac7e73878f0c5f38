// AVX-512 intrinsics and AMX in plain C++, for the kernels that use them to be compiled and tested on CPUs without.
//
// Shadows the compiler's <immintrin.h> (tests/runtime/test_sanitizers.py puts this folder first): after the real header, whose
// 128- and 256-bit intrinsics stay, each 512-bit one that the kernels use is a function here that does to lanes what Intel's
// intrinsics guide says. Loads and stores under masks touch selected elements only, and aligned ones check their alignment.
#pragma once

#include <cpuid.h>
#include_next <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace emulated {

// 64 bytes, seen as lanes of any type; one type for each of the compiler's.
template <int kTag>
struct alignas(64) Vector {
  uint8_t bytes[64];
};
using F32 = Vector<0>;
using F64 = Vector<1>;
using Int = Vector<2>;

template <class T>
struct Lanes {
  static constexpr int kCount = 64 / static_cast<int>(sizeof(T));
  T at[kCount];
  T& operator[](int i) { return at[i]; }
  T operator[](int i) const { return at[i]; }
};

template <class T, class V>
inline Lanes<T> lanes(const V& vector) {
  Lanes<T> result;
  std::memcpy(result.at, &vector, sizeof result.at);
  return result;
}

template <class V, class T>
inline V vector(const Lanes<T>& from) {
  V result;
  std::memcpy(&result, from.at, sizeof result);
  return result;
}

template <class V, class T, class Function>
inline V make(const Function& function) {
  Lanes<T> result;
  for (int i = 0; i < Lanes<T>::kCount; ++i) result[i] = static_cast<T>(function(i));
  return vector<V>(result);
}

inline void check_aligned(const void* address, size_t alignment) {
  if (reinterpret_cast<uintptr_t>(address) % alignment == 0) return;
  std::fprintf(stderr, "an aligned 512-bit access at %p\n", address);
  std::abort();
}

// To nearest even, as the default rounding mode of the instructions; out of range and NaN give the lowest integer.
inline int32_t to_int(float value) {
  return value >= -2147483648.0f && value < 2147483648.0f ? static_cast<int32_t>(std::nearbyint(value)) : INT32_MIN;
}

template <class T, class V>
inline V interleave(const V& a, const V& b, bool high) {
  const auto x = lanes<T>(a), y = lanes<T>(b);
  constexpr int kPerPart = 16 / static_cast<int>(sizeof(T));
  return make<V, T>([&](int i) {
    const int part = i / kPerPart, j = i % kPerPart, from = part * kPerPart + (high ? kPerPart / 2 : 0) + j / 2;
    return j % 2 ? y[from] : x[from];
  });
}

inline Int shuffle_bytes(const Int& a, const Int& index) {
  const auto x = lanes<uint8_t>(a), at = lanes<uint8_t>(index);
  return make<Int, uint8_t>([&](int i) { return at[i] & 0x80 ? 0 : x[i / 16 * 16 + at[i] % 16]; });
}

template <class V, class T>
inline V masked_load(uint64_t mask, const void* from) {
  Lanes<T> result = {};
  for (int i = 0; i < Lanes<T>::kCount; ++i) {
    if (mask >> i & 1) std::memcpy(&result[i], static_cast<const char*>(from) + i * sizeof(T), sizeof(T));
  }
  return vector<V>(result);
}

// The first `count` elements of any vector, where the mask has ones.
template <class T, class V>
inline void masked_store(void* to, uint64_t mask, const V& value, int count) {
  T elements[sizeof(V) / sizeof(T)];
  std::memcpy(elements, &value, sizeof value);
  for (int i = 0; i < count; ++i) {
    if (mask >> i & 1) std::memcpy(static_cast<char*>(to) + i * sizeof(T), &elements[i], sizeof(T));
  }
}

template <class V, class T>
inline V masked_load_of(uint64_t mask, const void* from) {
  T elements[sizeof(V) / sizeof(T)] = {};
  for (size_t i = 0; i < sizeof(V) / sizeof(T); ++i) {
    if (mask >> i & 1) std::memcpy(&elements[i], static_cast<const char*>(from) + i * sizeof(T), sizeof(T));
  }
  V result;
  std::memcpy(&result, elements, sizeof result);
  return result;
}

template <class V>
inline V part_of(const void* vector, int part) {
  V result;
  std::memcpy(&result, static_cast<const char*>(vector) + part * sizeof(V), sizeof(V));
  return result;
}

inline F32 mm512_setzero_ps() { return F32{}; }
inline Int mm512_setzero_si512() { return Int{}; }
inline F32 mm512_set1_ps(float v) { return make<F32, float>([&](int) { return v; }); }
inline Int mm512_set1_epi32(int32_t v) { return make<Int, int32_t>([&](int) { return v; }); }
inline Int mm512_set1_epi8(int8_t v) { return make<Int, int8_t>([&](int) { return v; }); }
inline Int mm512_set1_epi64(int64_t v) { return make<Int, int64_t>([&](int) { return v; }); }
template <class... T>
inline Int mm512_setr_epi32(T... values) {
  const int32_t all[16] = {values...};
  return make<Int, int32_t>([&](int i) { return all[i]; });
}
inline F32 mm512_loadu_ps(const void* p) { return part_of<F32>(p, 0); }
inline F32 mm512_load_ps(const void* p) { check_aligned(p, 64); return part_of<F32>(p, 0); }
inline Int mm512_loadu_si512(const void* p) { return part_of<Int>(p, 0); }
inline Int mm512_load_si512(const void* p) { check_aligned(p, 64); return part_of<Int>(p, 0); }
inline void mm512_storeu_ps(void* p, const F32& v) { std::memcpy(p, &v, sizeof v); }
inline void mm512_store_ps(void* p, const F32& v) { check_aligned(p, 64); std::memcpy(p, &v, sizeof v); }
inline void mm512_store_si512(void* p, const Int& v) { check_aligned(p, 64); std::memcpy(p, &v, sizeof v); }
inline F32 mm512_maskz_loadu_ps(__mmask16 m, const void* p) { return masked_load<F32, float>(m, p); }
inline Int mm512_maskz_loadu_epi32(__mmask16 m, const void* p) { return masked_load<Int, int32_t>(m, p); }
inline void mm512_mask_storeu_ps(void* p, __mmask16 m, const F32& v) { masked_store<float>(p, m, v, 16); }
inline void mm256_mask_storeu_ps(void* p, __mmask8 m, __m256 v) { masked_store<float>(p, m, v, 8); }
inline void mm256_mask_storeu_epi32(void* p, __mmask8 m, __m256i v) { masked_store<int32_t>(p, m, v, 8); }
inline void mm256_mask_storeu_epi16(void* p, __mmask16 m, __m256i v) { masked_store<int16_t>(p, m, v, 16); }
inline __m256i mm256_maskz_loadu_epi16(__mmask16 m, const void* p) { return masked_load_of<__m256i, int16_t>(m, p); }
inline __m256 mm256_maskz_loadu_ps(__mmask8 m, const void* p) { return masked_load_of<__m256, float>(m, p); }
inline __m128i mm_maskz_loadu_epi16(__mmask8 m, const void* p) { return masked_load_of<__m128i, int16_t>(m, p); }
inline F32 mm512_maskz_mov_ps(__mmask16 m, const F32& a) {
  const auto x = lanes<float>(a);
  return make<F32, float>([&](int i) { return (m >> i) & 1 ? x[i] : 0.0f; });
}
inline F32 mm512_add_ps(const F32& a, const F32& b) {
  const auto x = lanes<float>(a), y = lanes<float>(b);
  return make<F32, float>([&](int i) { return x[i] + y[i]; });
}
inline F32 mm512_mul_ps(const F32& a, const F32& b) {
  const auto x = lanes<float>(a), y = lanes<float>(b);
  return make<F32, float>([&](int i) { return x[i] * y[i]; });
}
inline F32 mm512_fmadd_ps(const F32& a, const F32& b, const F32& c) {
  const auto x = lanes<float>(a), y = lanes<float>(b), z = lanes<float>(c);
  return make<F32, float>([&](int i) { return std::fma(x[i], y[i], z[i]); });
}
inline F32 mm512_maskz_div_ps(__mmask16 m, const F32& a, const F32& b) {
  const auto x = lanes<float>(a), y = lanes<float>(b);
  return make<F32, float>([&](int i) { return m >> i & 1 ? x[i] / y[i] : 0.0f; });
}
inline Int mm512_add_epi32(const Int& a, const Int& b) {
  const auto x = lanes<uint32_t>(a), y = lanes<uint32_t>(b);
  return make<Int, uint32_t>([&](int i) { return x[i] + y[i]; });
}
inline Int mm512_sub_epi32(const Int& a, const Int& b) {
  const auto x = lanes<uint32_t>(a), y = lanes<uint32_t>(b);
  return make<Int, uint32_t>([&](int i) { return x[i] - y[i]; });
}
inline Int mm512_and_si512(const Int& a, const Int& b) {
  const auto x = lanes<uint32_t>(a), y = lanes<uint32_t>(b);
  return make<Int, uint32_t>([&](int i) { return x[i] & y[i]; });
}
inline Int mm512_or_si512(const Int& a, const Int& b) {
  const auto x = lanes<uint32_t>(a), y = lanes<uint32_t>(b);
  return make<Int, uint32_t>([&](int i) { return x[i] | y[i]; });
}
inline Int mm512_xor_si512(const Int& a, const Int& b) {
  const auto x = lanes<uint32_t>(a), y = lanes<uint32_t>(b);
  return make<Int, uint32_t>([&](int i) { return x[i] ^ y[i]; });
}
inline Int mm512_max_epu32(const Int& a, const Int& b) {
  const auto x = lanes<uint32_t>(a), y = lanes<uint32_t>(b);
  return make<Int, uint32_t>([&](int i) { return x[i] > y[i] ? x[i] : y[i]; });
}
inline Int mm512_slli_epi32(const Int& a, unsigned shift) {
  const auto x = lanes<uint32_t>(a);
  return make<Int, uint32_t>([&](int i) { return shift < 32 ? x[i] << shift : 0; });
}
inline Int mm512_srli_epi32(const Int& a, unsigned shift) {
  const auto x = lanes<uint32_t>(a);
  return make<Int, uint32_t>([&](int i) { return shift < 32 ? x[i] >> shift : 0; });
}
inline Int mm512_slli_epi16(const Int& a, unsigned shift) {
  const auto x = lanes<uint16_t>(a);
  return make<Int, uint16_t>([&](int i) { return shift < 16 ? x[i] << shift : 0; });
}
inline Int mm512_srli_epi16(const Int& a, unsigned shift) {
  const auto x = lanes<uint16_t>(a);
  return make<Int, uint16_t>([&](int i) { return shift < 16 ? x[i] >> shift : 0; });
}
inline Int mm512_srai_epi16(const Int& a, unsigned shift) {
  const auto x = lanes<int16_t>(a);
  return make<Int, int16_t>([&](int i) { return x[i] >> (shift < 16 ? shift : 15); });
}
inline Int mm512_ror_epi32(const Int& a, int shift) {
  const auto x = lanes<uint32_t>(a);
  const unsigned s = static_cast<unsigned>(shift) % 32;
  return make<Int, uint32_t>([&](int i) { return s ? x[i] >> s | x[i] << (32 - s) : x[i]; });
}
inline Int mm512_ternarylogic_epi32(const Int& a, const Int& b, const Int& c, int table) { const auto x = lanes<uint32_t>(a), y = lanes<uint32_t>(b), z = lanes<uint32_t>(c);
  return make<Int, uint32_t>([&](int i) {
    uint32_t result = 0;
    for (int bit = 0; bit < 32; ++bit) {
      const uint32_t index = (x[i] >> bit & 1) << 2 | (y[i] >> bit & 1) << 1 | (z[i] >> bit & 1);
      result |= (static_cast<uint32_t>(table) >> index & 1) << bit;
    }
    return result;
  }); }
inline Int mm512_madd_epi16(const Int& a, const Int& b) {
  const auto x = lanes<int16_t>(a), y = lanes<int16_t>(b);
  return make<Int, int32_t>([&](int i) { return x[2 * i] * y[2 * i] + x[2 * i + 1] * y[2 * i + 1]; });
}
inline Int mm512_dpbusd_epi32(const Int& sum, const Int& a, const Int& b) { const auto s = lanes<int32_t>(sum); const auto x = lanes<uint8_t>(a); const auto y = lanes<int8_t>(b);
  return make<Int, int32_t>([&](int i) {
    int32_t result = s[i];
    for (int j = 4 * i; j < 4 * i + 4; ++j) result += x[j] * y[j];
    return result;
  }); }
inline Int mm512_shuffle_epi8(const Int& a, const Int& index) { return shuffle_bytes(a, index); }
inline Int mm512_mask_shuffle_epi8(const Int& old, __mmask64 m, const Int& a, const Int& index) {
  const auto from = lanes<uint8_t>(old), x = lanes<uint8_t>(shuffle_bytes(a, index));
  return make<Int, uint8_t>([&](int i) { return m >> i & 1 ? x[i] : from[i]; });
}
inline Int mm512_mask_blend_epi8(__mmask64 m, const Int& a, const Int& b) {
  const auto x = lanes<uint8_t>(a), y = lanes<uint8_t>(b);
  return make<Int, uint8_t>([&](int i) { return m >> i & 1 ? y[i] : x[i]; });
}
inline Int mm512_mask_blend_epi16(__mmask32 m, const Int& a, const Int& b) {
  const auto x = lanes<uint16_t>(a), y = lanes<uint16_t>(b);
  return make<Int, uint16_t>([&](int i) { return m >> i & 1 ? y[i] : x[i]; });
}
inline Int mm512_permutexvar_epi8(const Int& index, const Int& a) {
  const auto at = lanes<uint8_t>(index), x = lanes<uint8_t>(a);
  return make<Int, uint8_t>([&](int i) { return x[at[i] % 64]; });
}
inline F32 mm512_permutexvar_ps(const Int& index, const F32& a) {
  const auto at = lanes<uint32_t>(index);
  const auto x = lanes<float>(a);
  return make<F32, float>([&](int i) { return x[static_cast<int>(at[i] % 16)]; });
}
inline F32 mm512_permutex2var_ps(const F32& a, const Int& index, const F32& b) {
  const auto at = lanes<uint32_t>(index);
  const auto x = lanes<float>(a), y = lanes<float>(b);
  return make<F32, float>([&](int i) { const int from = static_cast<int>(at[i] % 32); return from < 16 ? x[from] : y[from - 16]; });
}
inline F32 mm512_permutevar_ps(const F32& a, const Int& control) {
  const auto at = lanes<uint32_t>(control);
  const auto x = lanes<float>(a);
  return make<F32, float>([&](int i) { return x[i / 4 * 4 + static_cast<int>(at[i] % 4)]; });
}
inline F32 mm512_mask_blend_ps(__mmask16 m, const F32& a, const F32& b) {
  const auto x = lanes<float>(a), y = lanes<float>(b);
  return make<F32, float>([&](int i) { return m >> i & 1 ? y[i] : x[i]; });
}
template <class Part>
inline F32 repeated(const Part& part, int count) {
  float values[sizeof(Part) / sizeof(float)];
  std::memcpy(values, &part, sizeof part);
  return make<F32, float>([&](int i) { return values[i % count]; });
}
inline F32 mm512_broadcast_f32x2(__m128 a) { return repeated(a, 2); }
inline F32 mm512_broadcast_f32x4(__m128 a) { return repeated(a, 4); }
inline F32 mm512_broadcast_f32x8(__m256 a) { return repeated(a, 8); }
inline F32 mm512_mask_broadcast_f32x4(const F32& old, __mmask16 m, __m128 a) { return mm512_mask_blend_ps(m, old, repeated(a, 4)); }
inline F32 mm512_mask_broadcast_f32x8(const F32& old, __mmask16 m, __m256 a) { return mm512_mask_blend_ps(m, old, repeated(a, 8)); }
inline F32 mm512_mask_i32gather_ps(const F32& old, __mmask16 m, const Int& index, const void* from, int scale) {
  const auto at = lanes<int32_t>(index);
  auto result = lanes<float>(old);
  for (int i = 0; i < 16; ++i) {
    if (m >> i & 1) std::memcpy(&result[i], static_cast<const char*>(from) + static_cast<int64_t>(at[i]) * scale, sizeof(float));
  }
  return vector<F32>(result);
}
inline int every_feature(unsigned, unsigned, unsigned* a, unsigned* b, unsigned* c, unsigned* d) {
  *a = *b = *c = *d = ~0u;
  return 1;
}
inline Int mm512_cvtepu16_epi32(__m256i a) {
  uint16_t values[16];
  std::memcpy(values, &a, sizeof values);
  return make<Int, int32_t>([&](int i) { return values[i]; });
}
inline __mmask16 mm512_cmpgt_epi32_mask(const Int& a, const Int& b) {
  const auto x = lanes<int32_t>(a), y = lanes<int32_t>(b);
  __mmask16 mask = 0;
  for (int i = 0; i < 16; ++i) mask = static_cast<__mmask16>(mask | (x[i] > y[i]) << i);
  return mask;
}
inline Int mm512_multishift_epi64_epi8(const Int& starts, const Int& a) { const auto at = lanes<uint8_t>(starts); const auto x = lanes<uint64_t>(a);
  return make<Int, uint8_t>([&](int i) {
    const unsigned s = at[i] % 64;
    return static_cast<uint8_t>(s ? x[i / 8] >> s | x[i / 8] << (64 - s) : x[i / 8]);
  }); }
inline F32 mm512_unpacklo_ps(const F32& a, const F32& b) { return interleave<float>(a, b, false); }
inline F32 mm512_unpackhi_ps(const F32& a, const F32& b) { return interleave<float>(a, b, true); }
inline F64 mm512_unpacklo_pd(const F64& a, const F64& b) { return interleave<double>(a, b, false); }
inline F64 mm512_unpackhi_pd(const F64& a, const F64& b) { return interleave<double>(a, b, true); }
inline F32 mm512_shuffle_f32x4(const F32& a, const F32& b, int control) {
  const auto x = lanes<float>(a), y = lanes<float>(b);
  return make<F32, float>([&](int i) { const int from = control >> (2 * (i / 4)) & 3; return (i < 8 ? x : y)[4 * from + i % 4]; });
}
inline Int mm512_broadcast_i32x4(__m128i a) {
  uint8_t bytes[16];
  std::memcpy(bytes, &a, 16);
  return make<Int, uint8_t>([&](int i) { return bytes[i % 16]; });
}
inline Int mm512_broadcast_i64x4(__m256i a) {
  uint8_t bytes[32];
  std::memcpy(bytes, &a, 32);
  return make<Int, uint8_t>([&](int i) { return bytes[i % 32]; });
}
inline F32 mm512_castpd_ps(const F64& a) { return part_of<F32>(&a, 0); }
inline F64 mm512_castps_pd(const F32& a) { return part_of<F64>(&a, 0); }
inline Int mm512_castps_si512(const F32& a) { return part_of<Int>(&a, 0); }
inline F32 mm512_castsi512_ps(const Int& a) { return part_of<F32>(&a, 0); }
inline __m256 mm512_castps512_ps256(const F32& a) { return part_of<__m256>(&a, 0); }
inline __m256i mm512_castsi512_si256(const Int& a) { return part_of<__m256i>(&a, 0); }
inline __m256 mm512_extractf32x8_ps(const F32& a, int part) { return part_of<__m256>(&a, part); }
inline __m256i mm512_extracti64x4_epi64(const Int& a, int part) { return part_of<__m256i>(&a, part); }
inline F32 mm512_cvtepi32_ps(const Int& a) {
  const auto x = lanes<int32_t>(a);
  return make<F32, float>([&](int i) { return x[i]; });
}
inline Int mm512_cvtepu8_epi32(__m128i a) {
  uint8_t bytes[16];
  std::memcpy(bytes, &a, 16);
  return make<Int, int32_t>([&](int i) { return bytes[i]; });
}
inline Int mm512_maskz_cvtps_epi32(__mmask16 m, const F32& a) {
  const auto x = lanes<float>(a);
  return make<Int, int32_t>([&](int i) { return m >> i & 1 ? to_int(x[i]) : 0; });
}
inline F32 mm512_cvtph_ps(__m256i a) {
  const __m256 halves[2] = {_mm256_cvtph_ps(_mm256_castsi256_si128(a)), _mm256_cvtph_ps(_mm256_extracti128_si256(a, 1))};
  return part_of<F32>(halves, 0);
}
inline __m256i mm512_cvtps_ph(const F32& a, int) {
  return _mm256_set_m128i(_mm256_cvtps_ph(part_of<__m256>(&a, 1), _MM_FROUND_TO_NEAREST_INT), _mm256_cvtps_ph(part_of<__m256>(&a, 0), _MM_FROUND_TO_NEAREST_INT));
}
inline __mmask16 mm512_cmpge_epu32_mask(const Int& a, const Int& b) {
  const auto x = lanes<uint32_t>(a), y = lanes<uint32_t>(b);
  __mmask16 result = 0;
  for (int i = 0; i < 16; ++i) if (x[i] >= y[i]) result = static_cast<__mmask16>(result | 1u << i);
  return result;
}
inline __mmask16 mm512_test_epi32_mask(const Int& a, const Int& b) {
  const auto x = lanes<uint32_t>(a), y = lanes<uint32_t>(b);
  __mmask16 result = 0;
  for (int i = 0; i < 16; ++i) if ((x[i] & y[i]) != 0) result = static_cast<__mmask16>(result | 1u << i);
  return result;
}
inline __mmask16 mm512_mask_cmp_ps_mask(__mmask16 m, const F32& a, const F32& b, int predicate) {
  if (predicate != _CMP_LT_OQ) std::abort();
  const auto x = lanes<float>(a), y = lanes<float>(b);
  __mmask16 result = 0;
  for (int i = 0; i < 16; ++i) if ((m >> i & 1) && x[i] < y[i]) result = static_cast<__mmask16>(result | 1u << i);
  return result;
}

// What a cast leaves undefined is a NaN here.
template <class V>
inline F32 widened(V a) {
  F32 result;
  std::memset(&result, 0xff, sizeof result);
  std::memcpy(&result, &a, sizeof a);
  return result;
}
template <class V, class Part>
inline V with_part(const V& a, Part b, int part) {
  V result = a;
  std::memcpy(reinterpret_cast<char*>(&result) + part * sizeof b, &b, sizeof b);
  return result;
}
inline F32 mm512_castps128_ps512(__m128 a) { return widened(a); }
inline F32 mm512_castps256_ps512(__m256 a) { return widened(a); }
inline F32 mm512_insertf32x4(const F32& a, __m128 b, int part) { return with_part(a, b, part); }
inline F32 mm512_insertf32x8(const F32& a, __m256 b, int part) { return with_part(a, b, part); }
inline __m128i mm512_castsi512_si128(const Int& a) { return part_of<__m128i>(&a, 0); }
inline __m128 mm512_extractf32x4_ps(const F32& a, int part) { return part_of<__m128>(&a, part); }
inline void mm512_mask_storeu_epi32(void* p, __mmask16 m, const Int& v) { masked_store<int32_t>(p, m, v, 16); }
inline void mm512_mask_i32scatter_epi32(void* p, __mmask16 m, const Int& index, const Int& v, int scale) {
  const auto at = lanes<int32_t>(index), x = lanes<int32_t>(v);
  for (int i = 0; i < 16; ++i) {
    const int32_t value = x[i];
    if (m >> i & 1) std::memcpy(static_cast<char*>(p) + static_cast<int64_t>(at[i]) * scale, &value, sizeof value);
  }
}
inline Int mm512_maskz_compress_epi32(__mmask16 m, const Int& a) {
  const auto x = lanes<int32_t>(a);
  Lanes<int32_t> result = {};
  for (int i = 0, to = 0; i < 16; ++i) if (m >> i & 1) result[to++] = x[i];
  return vector<Int>(result);
}
inline __mmask16 mm512_movepi32_mask(const Int& a) {
  const auto x = lanes<int32_t>(a);
  __mmask16 result = 0;
  for (int i = 0; i < 16; ++i) if (x[i] < 0) result = static_cast<__mmask16>(result | 1u << i);
  return result;
}
inline Int mm512_mullo_epi32(const Int& a, const Int& b) {
  const auto x = lanes<uint32_t>(a), y = lanes<uint32_t>(b);
  return make<Int, uint32_t>([&](int i) { return x[i] * y[i]; });
}
// In each 16 bytes those of a and then those of b, saturated to half their size.
template <class From, class To>
inline Int packed(const Int& a, const Int& b) {
  constexpr int kHalf = 16 / static_cast<int>(sizeof(From)), kLowest = sizeof(To) == 1 ? INT8_MIN : INT16_MIN;
  const auto x = lanes<From>(a), y = lanes<From>(b);
  return make<Int, To>([&](int i) {
    const int part = i / (2 * kHalf), j = i % (2 * kHalf), value = (j < kHalf ? x : y)[part * kHalf + j % kHalf];
    return value < kLowest ? kLowest : value > -kLowest - 1 ? -kLowest - 1 : value;
  });
}
inline Int mm512_packs_epi32(const Int& a, const Int& b) { return packed<int32_t, int16_t>(a, b); }
inline Int mm512_packs_epi16(const Int& a, const Int& b) { return packed<int16_t, int8_t>(a, b); }
inline Int mm512_permutexvar_epi32(const Int& index, const Int& a) {
  const auto at = lanes<uint32_t>(index), x = lanes<uint32_t>(a);
  return make<Int, uint32_t>([&](int i) { return x[static_cast<int>(at[i] % 16)]; });
}
inline Int mm512_shuffle_i64x2(const Int& a, const Int& b, int control) {
  const auto x = lanes<uint32_t>(a), y = lanes<uint32_t>(b);
  return make<Int, uint32_t>([&](int i) { const int from = control >> (2 * (i / 4)) & 3; return (i < 8 ? x : y)[4 * from + i % 4]; });
}
inline Int mm512_unpacklo_epi32(const Int& a, const Int& b) { return interleave<int32_t>(a, b, false); }
inline Int mm512_unpackhi_epi32(const Int& a, const Int& b) { return interleave<int32_t>(a, b, true); }
inline Int mm512_unpacklo_epi64(const Int& a, const Int& b) { return interleave<int64_t>(a, b, false); }
inline Int mm512_unpackhi_epi64(const Int& a, const Int& b) { return interleave<int64_t>(a, b, true); }
// Of 128 bits: those of 512 whose upper lanes nobody asks for.
template <class V, class Part>
inline V zero_extended(Part a) { return with_part(V{}, a, 0); }
inline __mmask8 mm_cmpge_epu32_mask(__m128i a, __m128i b) {
  return static_cast<__mmask8>(mm512_cmpge_epu32_mask(zero_extended<Int>(a), zero_extended<Int>(b)) & 15);
}
inline __mmask8 mm_test_epi32_mask(__m128i a, __m128i b) {
  return static_cast<__mmask8>(mm512_test_epi32_mask(zero_extended<Int>(a), zero_extended<Int>(b)) & 15);
}
inline __mmask8 mm_mask_cmp_ps_mask(__mmask8 m, __m128 a, __m128 b, int predicate) {
  return static_cast<__mmask8>(mm512_mask_cmp_ps_mask(m & 15, zero_extended<F32>(a), zero_extended<F32>(b), predicate));
}
inline __m128 mm_maskz_div_ps(__mmask8 m, __m128 a, __m128 b) {
  return mm512_extractf32x4_ps(mm512_maskz_div_ps(m & 15, zero_extended<F32>(a), zero_extended<F32>(b)), 0);
}

// ---- the tile registers of AMX: sizes are those of the configuration, and what lies beyond them is not touched

struct Tile {
  int rows, row_bytes;
  uint8_t at[16][64];
};
inline Tile* tiles() {
  static thread_local Tile registers[8];
  return registers;
}
inline void load_tile_configuration(const void* from) {
  uint8_t bytes[64];
  check_aligned(from, 64);
  std::memcpy(bytes, from, sizeof bytes);
  for (int i = 0; i < 8; ++i) {
    const int rows = bytes[48 + i], row_bytes = bytes[16 + 2 * i] | bytes[17 + 2 * i] << 8;
    if (bytes[0] != 1 || rows > 16 || row_bytes > 64) std::abort();
    tiles()[i] = Tile{rows, row_bytes, {}};
  }
}
inline void release_tiles() {
  for (int i = 0; i < 8; ++i) tiles()[i] = Tile{};
}
inline Tile& used_tile(int i) {
  if (tiles()[i].rows == 0) {
    std::fprintf(stderr, "tile register %d is not configured\n", i);
    std::abort();
  }
  return tiles()[i];
}
inline void zero_tile(int i) { std::memset(used_tile(i).at, 0, sizeof Tile::at); }
inline void load_tile(int i, const void* from, int64_t row_stride) {
  Tile& tile = used_tile(i);
  zero_tile(i);
  for (int row = 0; row < tile.rows; ++row) std::memcpy(tile.at[row], static_cast<const char*>(from) + row * row_stride, tile.row_bytes);
}
inline void store_tile(int i, void* to, int64_t row_stride) {
  const Tile& tile = used_tile(i);
  for (int row = 0; row < tile.rows; ++row) std::memcpy(static_cast<char*>(to) + row * row_stride, tile.at[row], tile.row_bytes);
}
inline void add_signed_products(int sum, int a, int b) {
  const Tile &x = used_tile(a), &y = used_tile(b);
  Tile& result = used_tile(sum);
  if (result.rows != x.rows || result.row_bytes != y.row_bytes || x.row_bytes != 4 * y.rows) std::abort();
  for (int row = 0; row < x.rows; ++row) {
    int32_t sums[16];
    std::memcpy(sums, result.at[row], sizeof sums);
    for (int n = 0; n < y.row_bytes / 4; ++n) {
      for (int k = 0; k < x.row_bytes; ++k) {
        sums[n] += static_cast<int8_t>(x.at[row][k]) * static_cast<int8_t>(y.at[k / 4][4 * n + k % 4]);
      }
    }
    std::memcpy(result.at[row], sums, sizeof sums);
  }
}

}  // namespace emulated

#define CLAQ_EMULATED_TILES  // see amx_tiles.h

// The CPU is asked about nothing else by the files that see this header.
#define __builtin_cpu_supports(feature) 1
#define __get_cpuid_count emulated::every_feature
#define __m512 emulated::F32
#define __m512d emulated::F64
#define __m512i emulated::Int
#undef _mm512_setzero_ps
#define _mm512_setzero_ps emulated::mm512_setzero_ps
#undef _mm512_setzero_si512
#define _mm512_setzero_si512 emulated::mm512_setzero_si512
#undef _mm512_set1_ps
#define _mm512_set1_ps emulated::mm512_set1_ps
#undef _mm512_set1_epi32
#define _mm512_set1_epi32 emulated::mm512_set1_epi32
#undef _mm512_set1_epi8
#define _mm512_set1_epi8 emulated::mm512_set1_epi8
#undef _mm512_set1_epi64
#define _mm512_set1_epi64 emulated::mm512_set1_epi64
#undef _mm512_setr_epi32
#define _mm512_setr_epi32 emulated::mm512_setr_epi32
#undef _mm512_loadu_ps
#define _mm512_loadu_ps emulated::mm512_loadu_ps
#undef _mm512_load_ps
#define _mm512_load_ps emulated::mm512_load_ps
#undef _mm512_loadu_si512
#define _mm512_loadu_si512 emulated::mm512_loadu_si512
#undef _mm512_load_si512
#define _mm512_load_si512 emulated::mm512_load_si512
#undef _mm512_storeu_ps
#define _mm512_storeu_ps emulated::mm512_storeu_ps
#undef _mm512_store_ps
#define _mm512_store_ps emulated::mm512_store_ps
#undef _mm512_store_si512
#define _mm512_store_si512 emulated::mm512_store_si512
#undef _mm512_maskz_loadu_ps
#define _mm512_maskz_loadu_ps emulated::mm512_maskz_loadu_ps
#undef _mm512_maskz_mov_ps
#define _mm512_maskz_mov_ps emulated::mm512_maskz_mov_ps
#undef _mm512_maskz_loadu_epi32
#define _mm512_maskz_loadu_epi32 emulated::mm512_maskz_loadu_epi32
#undef _mm512_mask_storeu_ps
#define _mm512_mask_storeu_ps emulated::mm512_mask_storeu_ps
#undef _mm256_mask_storeu_ps
#define _mm256_mask_storeu_ps emulated::mm256_mask_storeu_ps
#undef _mm256_mask_storeu_epi32
#define _mm256_mask_storeu_epi32 emulated::mm256_mask_storeu_epi32
#undef _mm256_mask_storeu_epi16
#define _mm256_mask_storeu_epi16 emulated::mm256_mask_storeu_epi16
#undef _mm256_maskz_loadu_epi16
#define _mm256_maskz_loadu_epi16 emulated::mm256_maskz_loadu_epi16
#undef _mm256_maskz_loadu_ps
#define _mm256_maskz_loadu_ps emulated::mm256_maskz_loadu_ps
#undef _mm_maskz_loadu_epi16
#define _mm_maskz_loadu_epi16 emulated::mm_maskz_loadu_epi16
#undef _mm512_permutex2var_ps
#define _mm512_permutex2var_ps emulated::mm512_permutex2var_ps
#undef _mm512_permutevar_ps
#define _mm512_permutevar_ps emulated::mm512_permutevar_ps
#undef _mm512_mask_blend_ps
#define _mm512_mask_blend_ps emulated::mm512_mask_blend_ps
#undef _mm512_broadcast_f32x2
#define _mm512_broadcast_f32x2 emulated::mm512_broadcast_f32x2
#undef _mm512_broadcast_f32x4
#define _mm512_broadcast_f32x4 emulated::mm512_broadcast_f32x4
#undef _mm512_broadcast_f32x8
#define _mm512_broadcast_f32x8 emulated::mm512_broadcast_f32x8
#undef _mm512_mask_broadcast_f32x4
#define _mm512_mask_broadcast_f32x4 emulated::mm512_mask_broadcast_f32x4
#undef _mm512_mask_broadcast_f32x8
#define _mm512_mask_broadcast_f32x8 emulated::mm512_mask_broadcast_f32x8
#undef _mm512_mask_i32gather_ps
#define _mm512_mask_i32gather_ps emulated::mm512_mask_i32gather_ps
#undef _mm512_cvtepu16_epi32
#define _mm512_cvtepu16_epi32 emulated::mm512_cvtepu16_epi32
#undef _mm512_cmpgt_epi32_mask
#define _mm512_cmpgt_epi32_mask emulated::mm512_cmpgt_epi32_mask
#undef _mm512_add_ps
#define _mm512_add_ps emulated::mm512_add_ps
#undef _mm512_mul_ps
#define _mm512_mul_ps emulated::mm512_mul_ps
#undef _mm512_fmadd_ps
#define _mm512_fmadd_ps emulated::mm512_fmadd_ps
#undef _mm512_maskz_div_ps
#define _mm512_maskz_div_ps emulated::mm512_maskz_div_ps
#undef _mm512_add_epi32
#define _mm512_add_epi32 emulated::mm512_add_epi32
#undef _mm512_sub_epi32
#define _mm512_sub_epi32 emulated::mm512_sub_epi32
#undef _mm512_and_si512
#define _mm512_and_si512 emulated::mm512_and_si512
#undef _mm512_or_si512
#define _mm512_or_si512 emulated::mm512_or_si512
#undef _mm512_xor_si512
#define _mm512_xor_si512 emulated::mm512_xor_si512
#undef _mm512_max_epu32
#define _mm512_max_epu32 emulated::mm512_max_epu32
#undef _mm512_slli_epi32
#define _mm512_slli_epi32 emulated::mm512_slli_epi32
#undef _mm512_srli_epi32
#define _mm512_srli_epi32 emulated::mm512_srli_epi32
#undef _mm512_slli_epi16
#define _mm512_slli_epi16 emulated::mm512_slli_epi16
#undef _mm512_srli_epi16
#define _mm512_srli_epi16 emulated::mm512_srli_epi16
#undef _mm512_srai_epi16
#define _mm512_srai_epi16 emulated::mm512_srai_epi16
#undef _mm512_ror_epi32
#define _mm512_ror_epi32 emulated::mm512_ror_epi32
#undef _mm512_ternarylogic_epi32
#define _mm512_ternarylogic_epi32 emulated::mm512_ternarylogic_epi32
#undef _mm512_madd_epi16
#define _mm512_madd_epi16 emulated::mm512_madd_epi16
#undef _mm512_dpbusd_epi32
#define _mm512_dpbusd_epi32 emulated::mm512_dpbusd_epi32
#undef _mm512_shuffle_epi8
#define _mm512_shuffle_epi8 emulated::mm512_shuffle_epi8
#undef _mm512_mask_shuffle_epi8
#define _mm512_mask_shuffle_epi8 emulated::mm512_mask_shuffle_epi8
#undef _mm512_mask_blend_epi8
#define _mm512_mask_blend_epi8 emulated::mm512_mask_blend_epi8
#undef _mm512_mask_blend_epi16
#define _mm512_mask_blend_epi16 emulated::mm512_mask_blend_epi16
#undef _mm512_permutexvar_epi8
#define _mm512_permutexvar_epi8 emulated::mm512_permutexvar_epi8
#undef _mm512_permutexvar_ps
#define _mm512_permutexvar_ps emulated::mm512_permutexvar_ps
#undef _mm512_multishift_epi64_epi8
#define _mm512_multishift_epi64_epi8 emulated::mm512_multishift_epi64_epi8
#undef _mm512_unpacklo_ps
#define _mm512_unpacklo_ps emulated::mm512_unpacklo_ps
#undef _mm512_unpackhi_ps
#define _mm512_unpackhi_ps emulated::mm512_unpackhi_ps
#undef _mm512_unpacklo_pd
#define _mm512_unpacklo_pd emulated::mm512_unpacklo_pd
#undef _mm512_unpackhi_pd
#define _mm512_unpackhi_pd emulated::mm512_unpackhi_pd
#undef _mm512_shuffle_f32x4
#define _mm512_shuffle_f32x4 emulated::mm512_shuffle_f32x4
#undef _mm512_broadcast_i32x4
#define _mm512_broadcast_i32x4 emulated::mm512_broadcast_i32x4
#undef _mm512_broadcast_i64x4
#define _mm512_broadcast_i64x4 emulated::mm512_broadcast_i64x4
#undef _mm512_castpd_ps
#define _mm512_castpd_ps emulated::mm512_castpd_ps
#undef _mm512_castps_pd
#define _mm512_castps_pd emulated::mm512_castps_pd
#undef _mm512_castps_si512
#define _mm512_castps_si512 emulated::mm512_castps_si512
#undef _mm512_castsi512_ps
#define _mm512_castsi512_ps emulated::mm512_castsi512_ps
#undef _mm512_castps512_ps256
#define _mm512_castps512_ps256 emulated::mm512_castps512_ps256
#undef _mm512_castsi512_si256
#define _mm512_castsi512_si256 emulated::mm512_castsi512_si256
#undef _mm512_extractf32x8_ps
#define _mm512_extractf32x8_ps emulated::mm512_extractf32x8_ps
#undef _mm512_extracti64x4_epi64
#define _mm512_extracti64x4_epi64 emulated::mm512_extracti64x4_epi64
#undef _mm512_cvtepi32_ps
#define _mm512_cvtepi32_ps emulated::mm512_cvtepi32_ps
#undef _mm512_cvtepu8_epi32
#define _mm512_cvtepu8_epi32 emulated::mm512_cvtepu8_epi32
#undef _mm512_maskz_cvtps_epi32
#define _mm512_maskz_cvtps_epi32 emulated::mm512_maskz_cvtps_epi32
#undef _mm512_cvtph_ps
#define _mm512_cvtph_ps emulated::mm512_cvtph_ps
#undef _mm512_cvtps_ph
#define _mm512_cvtps_ph emulated::mm512_cvtps_ph
#undef _mm512_cmpge_epu32_mask
#define _mm512_cmpge_epu32_mask emulated::mm512_cmpge_epu32_mask
#undef _mm512_test_epi32_mask
#define _mm512_test_epi32_mask emulated::mm512_test_epi32_mask
#undef _mm512_mask_cmp_ps_mask
#define _mm512_mask_cmp_ps_mask emulated::mm512_mask_cmp_ps_mask
#undef _mm512_castps128_ps512
#define _mm512_castps128_ps512 emulated::mm512_castps128_ps512
#undef _mm512_castps256_ps512
#define _mm512_castps256_ps512 emulated::mm512_castps256_ps512
#undef _mm512_insertf32x4
#define _mm512_insertf32x4 emulated::mm512_insertf32x4
#undef _mm512_insertf32x8
#define _mm512_insertf32x8 emulated::mm512_insertf32x8
#undef _mm512_castsi512_si128
#define _mm512_castsi512_si128 emulated::mm512_castsi512_si128
#undef _mm512_extractf32x4_ps
#define _mm512_extractf32x4_ps emulated::mm512_extractf32x4_ps
#undef _mm512_mask_storeu_epi32
#define _mm512_mask_storeu_epi32 emulated::mm512_mask_storeu_epi32
#undef _mm512_mask_i32scatter_epi32
#define _mm512_mask_i32scatter_epi32 emulated::mm512_mask_i32scatter_epi32
#undef _mm512_maskz_compress_epi32
#define _mm512_maskz_compress_epi32 emulated::mm512_maskz_compress_epi32
#undef _mm512_movepi32_mask
#define _mm512_movepi32_mask emulated::mm512_movepi32_mask
#undef _mm512_mullo_epi32
#define _mm512_mullo_epi32 emulated::mm512_mullo_epi32
#undef _mm512_packs_epi32
#define _mm512_packs_epi32 emulated::mm512_packs_epi32
#undef _mm512_packs_epi16
#define _mm512_packs_epi16 emulated::mm512_packs_epi16
#undef _mm512_permutexvar_epi32
#define _mm512_permutexvar_epi32 emulated::mm512_permutexvar_epi32
#undef _mm512_shuffle_i64x2
#define _mm512_shuffle_i64x2 emulated::mm512_shuffle_i64x2
#undef _mm512_unpacklo_epi32
#define _mm512_unpacklo_epi32 emulated::mm512_unpacklo_epi32
#undef _mm512_unpackhi_epi32
#define _mm512_unpackhi_epi32 emulated::mm512_unpackhi_epi32
#undef _mm512_unpacklo_epi64
#define _mm512_unpacklo_epi64 emulated::mm512_unpacklo_epi64
#undef _mm512_unpackhi_epi64
#define _mm512_unpackhi_epi64 emulated::mm512_unpackhi_epi64
#undef _mm_cmpge_epu32_mask
#define _mm_cmpge_epu32_mask emulated::mm_cmpge_epu32_mask
#undef _mm_test_epi32_mask
#define _mm_test_epi32_mask emulated::mm_test_epi32_mask
#undef _mm_mask_cmp_ps_mask
#define _mm_mask_cmp_ps_mask emulated::mm_mask_cmp_ps_mask
#undef _mm_maskz_div_ps
#define _mm_maskz_div_ps emulated::mm_maskz_div_ps
