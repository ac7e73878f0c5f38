// A few rows of x on AMD's cores with VBMI and VNNI (avx512_vbmi.h). By Zen 4, whose four pipes take half a vector each a cycle: dot products
// and multishift go to the first two, byte permutations to the second and third, shifts to the last two, logic to any.
#pragma once

#include "avx512_vbmi.h"

namespace claq {
namespace {

// At 3 bits an index into a column's eight entries comes in two forms, which need neither a shift nor a multishift of their own for each
// group: bits of it lie where the code words have them.
//
//   groups of steps 0 and 1     bits 0, 1: the code's low bits    2, 3: third bits of both steps    4, 5: the column's place among four
//   groups of steps 2 and 3     bits 0, 1: the column's place     2, 3: third bits of both steps    4, 5: the code's low bits
//
// This is where each of 64 entries is found in the table of a group, which repeats what does not depend on the other step's third bit.
struct IndexOrder {
  uint8_t of_step[4][64];
  constexpr IndexOrder() : of_step() {
    for (int i = 0; i < 4; ++i) {
      for (int index = 0; index < 64; ++index) {
        const int first = index & 3, third = (index >> (2 + i % 2)) & 1, last = index >> 4;
        const int code = (i < 2 ? first : last) + 4 * third, place = i < 2 ? last : first;
        of_step[i][index] = static_cast<uint8_t>(8 * place + code);
      }
    }
  }
};
constexpr IndexOrder kIndexOrder;

struct Zen : Vnni {
  static constexpr int kMostRows = 4;  // more take their time, and gain nothing
  // 1.3 to 1.6 times the speed of reading from memory with one row of x, up to 1.3 times with four.
  static constexpr bool kToSecondLevel = true;
  static constexpr int rows_ahead(int width) { return width; }
  // At 3 bits registers are for tables and indices.
  static constexpr bool held_activations(int width) { return width != 3; }
  static constexpr int row_vectors(int width) { return width == 3 ? 2 : 4; }
  static constexpr int few_rows_vectors(int width) { return width == 3 ? 3 : 4; }

  template <int kWidth>
  static __m512i load_table(const uint8_t* table, int group) {
    const __m512i entries = Vnni::load_table<kWidth>(table, group);
    if constexpr (kWidth == 3) return _mm512_permutexvar_epi8(_mm512_loadu_si512(kIndexOrder.of_step[group % 4]), entries);
    return entries;
  }

  // At 3 bits: of both groups what does not come from the words of low bits.
  template <int kWidth>
  struct Step {
    __m512i high[2];
  };

  template <int kWidth, int, class Words>
  static Step<kWidth> step(const Words* words, int i) {
    Step<kWidth> result{};
    if constexpr (kWidth == 3) {
#pragma GCC unroll 2
      for (int second = 0; second < 2; ++second) {
        // The third bits of a column's four steps come to bits 2 to 5, or 0 to 3, of its byte.
        const __m512i starts = i < 2 ? _mm512_set1_epi64(second ? 0x3a36322e1a16120e : 0x2a26221e0a06023e)
                                     : _mm512_set1_epi64(second ? 0x3c3834301c181410 : 0x2c2824200c080400);
        const __m512i bits = _mm512_multishift_epi64_epi8(starts, words[0][2]);
        const __m512i places = _mm512_set1_epi32(i < 2 ? 0x30201000 : 0x03020100);
        result.high[second] = _mm512_ternarylogic_epi32(bits, _mm512_set1_epi8(12), places, 0xea);
      }
    }
    return result;
  }

  template <int kWidth, int kTogether, int kSecond, class Words>
  static void decode(const Words* words, const Step<kWidth>& step, int i, __m512i entries, __m512i* decoded) {
    if constexpr (kWidth == 3) {
      const __m512i low = i % 2 ? _mm512_srli_epi32(words[0][kSecond], 2) : words[0][kSecond];
      const __m512i index = _mm512_ternarylogic_epi32(low, step.high[kSecond], _mm512_set1_epi8(i < 2 ? 3 : 0x30), 0xe4);
      decoded[0] = _mm512_permutexvar_epi8(index, entries);
    } else {
      Vnni::decode<kWidth, kTogether, kSecond>(words, __m512i{}, i, entries, decoded);
    }
  }
};

}  // namespace
}  // namespace claq
