// AVX-512 without VBMI and VNNI: sixteen-entry byte shuffles merged under constant masks, and products of 16-bit pairs.
#include "avx512_float.h"
#include "avx512_int8.h"
#include "avx512_outliers.h"
#include "avx512_prepare.h"
#include "avx512_shuffle.h"
#include "plain_loops.h"

namespace claq {
namespace {

bool supported() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl");
}

struct Bw : ShuffleDecoder<-128> {
  // Bytes 0 and 2 of each lane, and bytes 1 and 3, as signed 16-bit pairs. Centroids are signed again, so sums need no
  // correction; bytes times bytes would have to be summed in 16 bits, which can overflow.
  struct Weights {
    __m512i even, odd;
  };
  using Activation = Weights;
  static constexpr int rows_ahead(int) { return 3; }
  static constexpr int few_rows_vectors(int width) { return width == 3 ? 3 : 4; }
  static constexpr int row_vectors(int) { return 4; }
  static constexpr bool kToSecondLevel = false;
  static constexpr bool held_activations(int) { return true; }
  static constexpr int kTileRows = 4, kTileVectors = 3, kShallowRows = 48, kShallowBlocks = 4;

  static Weights widen(__m512i bytes) { return {_mm512_srai_epi16(_mm512_slli_epi16(bytes, 8), 8), _mm512_srai_epi16(bytes, 8)}; }
  static __m512i begin(int32_t) { return _mm512_setzero_si512(); }
  static Weights weights(__m512i decoded) { return widen(decoded); }
  static Activation activation(const int8_t* four) { return widen(broadcast_four(four)); }
  static __m512i dot(__m512i sum, const Weights& w, const Activation& x) {
    return _mm512_add_epi32(_mm512_add_epi32(sum, _mm512_madd_epi16(w.even, x.even)), _mm512_madd_epi16(w.odd, x.odd));
  }
};

}  // namespace

const Family kAvx512Bw = {"avx512bw", supported, {20e9, 40e9}, {20e9, 60e9}, kRowsAtOnce, 1, true, false, kWideFloatSums, prepare_row, prepare_tile, transpose,
                          sums_int8<Bw>, sums_float, add_outliers, finish_row, half_row_to_float, float_row_to_half, swiglu, add_parts};

}  // namespace claq
