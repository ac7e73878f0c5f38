// AVX-512 without VBMI and VNNI: sixteen-entry byte shuffles merged under constant masks, and products of 16-bit pairs.
#include "avx512_float.h"
#include "avx512_int8.h"
#include "swiglu.h"

namespace claq {
namespace {

bool supported() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl");
}

struct Bw {
  // Bytes 0 and 2 of each lane, and bytes 1 and 3, as signed 16-bit pairs. Centroids are signed again, so sums need no
  // correction; bytes times bytes would have to be summed in 16 bits, which can overflow.
  struct Weights {
    __m512i even, odd;
  };
  using Table = const uint8_t*;
  using Activation = Weights;
  static constexpr int kTileRows = 4;

  static Weights widen(__m512i bytes) { return {_mm512_srai_epi16(_mm512_slli_epi16(bytes, 8), 8), _mm512_srai_epi16(bytes, 8)}; }
  static __m512i begin(int32_t) { return _mm512_setzero_si512(); }
  static Weights weights(__m512i decoded) { return widen(decoded); }
  static Activation activation(const int8_t* four) { return widen(broadcast_four(four)); }
  static __m512i dot(__m512i sum, const Weights& w, const Activation& x) {
    return _mm512_add_epi32(_mm512_add_epi32(sum, _mm512_madd_epi16(w.even, x.even)), _mm512_madd_epi16(w.odd, x.odd));
  }

  // Tables stay in memory; `decode` takes the sixteen bytes that each shuffle needs.
  template <int kWidth>
  static const uint8_t* load_table(const uint8_t* table, int group) {
    return table + ((4 * group) << kWidth);
  }

  static __m512i entries(const uint8_t* table, int part) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table + 16 * part));
    return _mm512_broadcast_i32x4(_mm_xor_si128(bytes, _mm_set1_epi8(-128)));
  }

  template <int kWidth>
  struct Step {
    __m512i at_bit_2[2];
  };

  // At 3 bits: the third bits of the columns of groups i and i + 4, each at bit 2 of its column's byte.
  template <int kWidth, class Words>
  static Step<kWidth> step(const Words& words, int i) {
    if constexpr (kWidth == 3) {
      const __m512i spread[2] = {
          _mm512_broadcast_i32x4(_mm_setr_epi8(0, 0, 1, 1, 4, 4, 5, 5, 8, 8, 9, 9, 12, 12, 13, 13)),
          _mm512_broadcast_i32x4(_mm_setr_epi8(2, 2, 3, 3, 6, 6, 7, 7, 10, 10, 11, 11, 14, 14, 15, 15))};
      Step<kWidth> result;
      for (int h = 0; h < 2; ++h) {
        const __m512i bytes = _mm512_shuffle_epi8(words[2], spread[h]);
        // Four bits a byte, one for each i: bytes 0 and 2 have theirs in the low half, 1 and 3 in the high half.
        const __m512i even = _mm512_srli_epi16(_mm512_slli_epi16(bytes, 2), i), odd = _mm512_srli_epi16(bytes, 2 + i);
        result.at_bit_2[h] = _mm512_mask_blend_epi8(0xaaaaaaaaaaaaaaaau, even, odd);
      }
      return result;
    }
    return {};
  }

  template <int kWidth, int kSecond, class Words>
  static __m512i decode(const Words& words, const Step<kWidth>& step, int i, const uint8_t* table) {
    if constexpr (kWidth == 4) {
      const __m512i codes = kSecond ? _mm512_srli_epi32(words[i], 4) : words[i];
      const __m512i index = _mm512_and_si512(codes, _mm512_set1_epi8(15));
      __m512i bytes = _mm512_shuffle_epi8(entries(table, 0), index);
      bytes = _mm512_mask_shuffle_epi8(bytes, 0x2222222222222222u, entries(table, 1), index);
      bytes = _mm512_mask_shuffle_epi8(bytes, 0x4444444444444444u, entries(table, 2), index);
      return _mm512_mask_shuffle_epi8(bytes, 0x8888888888888888u, entries(table, 3), index);
    } else {
      const __m512i low = _mm512_srli_epi32(words[kSecond], 2 * i);
      if constexpr (kWidth == 2) {
        const __m512i index = _mm512_ternarylogic_epi32(low, _mm512_set1_epi8(3), _mm512_set1_epi32(0x0c080400), 0xea);
        return _mm512_shuffle_epi8(entries(table, 0), index);
      } else {
        const __m512i third = _mm512_and_si512(step.at_bit_2[kSecond], _mm512_set1_epi8(4));
        const __m512i code = _mm512_ternarylogic_epi32(low, _mm512_set1_epi8(3), third, 0xea);
        const __m512i index = _mm512_or_si512(code, _mm512_set1_epi32(0x08000800));
        return _mm512_mask_shuffle_epi8(_mm512_shuffle_epi8(entries(table, 0), index), 0xccccccccccccccccu, entries(table, 1),
                                        index);
      }
    }
  }
};

}  // namespace

const Family kAvx512Bw = {"avx512bw", supported, {60e9, 250e9}, {60e9, 60e9}, kRowsAtOnce, 1, prepare_row, prepare_tile, transpose,
                          sums_int8<Bw>, sums_float, add_outliers, finish_row, half_row_to_float, float_row_to_half, swiglu};

}  // namespace claq
