// Decoding without VBMI, by byte shuffles of sixteen entries, which two columns of 3 bits and four of 2 share. At 4 bits a column needs a
// shuffle of its own, and there are four in a lane. Two vectors of outputs together need half as many: they exchange halves of their
// lanes, so that each shuffle finds two bytes of its column in a lane.
//
//   words (bytes of a lane)     first: n0 n1 n2 n3             second: m0 m1 m2 m3
//   exchanged, then looked up          n0 n1|m0 m1  columns 0, 1       m2 m3|n2 n3  columns 2, 3
//   exchanged back                     n0 n1 n2 n3                     m2 m3 m0 m1
#pragma once

#include "avx512_common.h"

namespace claq {
namespace {

// What `Isa` of avx512_int8.h needs of a decoder. `kFlip` is xored onto each entry: 0 leaves centroid + 128, -128 makes it signed.
template <int kFlip>
struct ShuffleDecoder {
  using Table = const uint8_t*;
  static constexpr bool kHeldTables = false;
  static constexpr __mmask32 kHighHalves = 0xaaaaaaaa;

  // Tables stay in memory; `decode` takes the sixteen bytes that each shuffle needs.
  template <int kWidth>
  static const uint8_t* load_table(const uint8_t* table, int group) {
    return table + ((4 * group) << kWidth);
  }

  static __m512i entries(const uint8_t* table, int part) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table + 16 * part));
    return _mm512_broadcast_i32x4(kFlip ? _mm_xor_si128(bytes, _mm_set1_epi8(kFlip)) : bytes);
  }

  template <int kWidth>
  static constexpr int kMostTogether = kWidth == 4 ? 2 : 1;

  template <int kWidth>
  struct Step {
    __m512i half[2];
  };

  // Of two vectors: the low halves of the first one's words below those of the second, and the high halves of the second below those
  // of the first. At 3 bits: the third bits of the columns of groups i and i + 4, each at bit 2 of its column's byte.
  template <int kWidth, int kTogether, class Words>
  static Step<kWidth> step(const Words* words, int i) {
    if constexpr (kTogether == 2) {
      const __m512i first = words[0][i], second = _mm512_ror_epi32(words[1][i], 16);
      return {{_mm512_mask_blend_epi16(kHighHalves, first, second), _mm512_mask_blend_epi16(kHighHalves, second, first)}};
    } else if constexpr (kWidth == 3) {
      const __m512i spread[2] = {
          _mm512_broadcast_i32x4(_mm_setr_epi8(0, 0, 1, 1, 4, 4, 5, 5, 8, 8, 9, 9, 12, 12, 13, 13)),
          _mm512_broadcast_i32x4(_mm_setr_epi8(2, 2, 3, 3, 6, 6, 7, 7, 10, 10, 11, 11, 14, 14, 15, 15))};
      Step<kWidth> result;
      for (int h = 0; h < 2; ++h) {
        const __m512i bytes = _mm512_shuffle_epi8(words[0][2], spread[h]);
        // Four bits a byte, one for each i: bytes 0 and 2 have theirs in the low half, 1 and 3 in the high half. All but the
        // last shift is the same for every i.
        const __m512i aligned = _mm512_mask_blend_epi8(0xaaaaaaaaaaaaaaaau, _mm512_slli_epi16(bytes, 2), _mm512_srli_epi16(bytes, 2));
        result.half[h] = _mm512_srli_epi16(aligned, i);
      }
      return result;
    }
    return {};
  }

  // The low four bits of each byte, of the second group the high ones.
  template <int kSecond>
  static __m512i nibbles(__m512i words) {
    return _mm512_and_si512(kSecond ? _mm512_srli_epi32(words, 4) : words, _mm512_set1_epi8(15));
  }

  template <int kWidth, int kTogether, int kSecond, class Words>
  static void decode(const Words* words, const Step<kWidth>& step, int i, const uint8_t* table, __m512i* decoded) {
    if constexpr (kTogether == 2) {
      __m512i bytes[2];
      for (int h = 0; h < 2; ++h) {
        const __m512i index = nibbles<kSecond>(step.half[h]);
        bytes[h] = _mm512_mask_shuffle_epi8(_mm512_shuffle_epi8(entries(table, 2 * h), index), 0xaaaaaaaaaaaaaaaau,
                                            entries(table, 2 * h + 1), index);
      }
      decoded[0] = _mm512_mask_blend_epi16(kHighHalves, bytes[0], bytes[1]);
      decoded[1] = _mm512_mask_blend_epi16(kHighHalves, bytes[1], bytes[0]);
    } else if constexpr (kWidth == 4) {
      const __m512i index = nibbles<kSecond>(words[0][i]);
      __m512i bytes = _mm512_shuffle_epi8(entries(table, 0), index);
      bytes = _mm512_mask_shuffle_epi8(bytes, 0x2222222222222222u, entries(table, 1), index);
      bytes = _mm512_mask_shuffle_epi8(bytes, 0x4444444444444444u, entries(table, 2), index);
      decoded[0] = _mm512_mask_shuffle_epi8(bytes, 0x8888888888888888u, entries(table, 3), index);
    } else {
      const __m512i low = _mm512_srli_epi32(words[0][kSecond], 2 * i);
      if constexpr (kWidth == 2) {
        const __m512i index = _mm512_ternarylogic_epi32(low, _mm512_set1_epi8(3), _mm512_set1_epi32(0x0c080400), 0xea);
        decoded[0] = _mm512_shuffle_epi8(entries(table, 0), index);
      } else {
        const __m512i codes = _mm512_ternarylogic_epi32(_mm512_set1_epi8(3), low, step.half[kSecond], 0xca);
        const __m512i index = _mm512_ternarylogic_epi32(codes, _mm512_set1_epi8(7), _mm512_set1_epi32(0x08000800), 0xea);
        decoded[0] = _mm512_mask_shuffle_epi8(_mm512_shuffle_epi8(entries(table, 0), index), 0xccccccccccccccccu, entries(table, 1),
                                              index);
      }
    }
  }
};

}  // namespace
}  // namespace claq
