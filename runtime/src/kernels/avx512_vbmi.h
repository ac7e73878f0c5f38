// What the families with VBMI and VNNI share. A code word is a 32-bit lane. One shift and one ternary logic step make four byte
// indices of a lane's four columns, one byte permutation looks up their centroids, one dot-product instruction multiplies them by
// four activations: 64 weights in about four instructions at any width.
#pragma once

#include "avx512_vnni.h"

namespace claq {
namespace {

inline bool has_vbmi_and_vnni() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni");
}

struct Vnni : VnniProducts {
  using Table = __m512i;
  static constexpr bool kHeldTables = true;
  static constexpr int rows_ahead(int width) { return 2 * width; }
  static constexpr int few_rows_vectors(int) { return 4; }
  static constexpr int row_vectors(int) { return 4; }
  static constexpr bool kToSecondLevel = false;
  static constexpr bool held_activations(int) { return true; }

  template <int kWidth>
  static __m512i load_table(const uint8_t* table, int group) {
    const uint8_t* entries = table + ((4 * group) << kWidth);
    if constexpr (kWidth == 4) return _mm512_loadu_si512(entries);
    if constexpr (kWidth == 3) return _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(entries)));
    return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(entries)));
  }

  template <int kWidth>
  static constexpr int kMostTogether = 1;

  template <int kWidth>
  using Step = __m512i;

  // At 3 bits: the third bit of columns i, 4 + i, ... , 28 + i in bit 0 of each nibble, and above it the two bits of the
  // column's place among four.
  template <int kWidth, int, class Words>
  static __m512i step(const Words* words, int i) {
    if constexpr (kWidth == 3) {
      return _mm512_ternarylogic_epi32(_mm512_srli_epi32(words[0][2], i), _mm512_set1_epi32(0x11111111),
                                       _mm512_set1_epi32(0x64206420), 0xea);
    }
    return __m512i{};
  }

  template <int kWidth, int, int kSecond, class Words>
  static void decode(const Words* words, const __m512i& step, int i, __m512i entries, __m512i* decoded) {
    if constexpr (kWidth == 4) {
      const __m512i codes = kSecond ? _mm512_srli_epi32(words[0][i], 4) : words[0][i];
      const __m512i index = _mm512_ternarylogic_epi32(codes, _mm512_set1_epi8(15), _mm512_set1_epi32(0x30201000), 0xea);
      decoded[0] = _mm512_permutexvar_epi8(index, entries);
    } else {
      const __m512i low = _mm512_srli_epi32(words[0][kSecond], 2 * i);
      if constexpr (kWidth == 2) {
        const __m512i index = _mm512_ternarylogic_epi32(low, _mm512_set1_epi8(3), _mm512_set1_epi32(0x0c080400), 0xea);
        decoded[0] = _mm512_shuffle_epi8(entries, index);
      } else {
        // The six bits from two below each nibble of `step` are an index but for its low two bits, which are those of `low`.
        const __m512i starts = _mm512_set1_epi64(kSecond ? 0x3a36322e1a16120e : 0x2a26221e0a06023e);
        const __m512i high = _mm512_multishift_epi64_epi8(starts, step);
        decoded[0] = _mm512_permutexvar_epi8(_mm512_ternarylogic_epi32(low, high, _mm512_set1_epi8(3), 0xe4), entries);
      }
    }
  }
};

}  // namespace
}  // namespace claq
