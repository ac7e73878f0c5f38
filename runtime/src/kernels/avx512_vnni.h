// What the families with VNNI share: how weights meet activations, and the register tile that suits it (avx512_int8.h).
#pragma once

#include "avx512_int8.h"

namespace claq {
namespace {

struct VnniProducts {
  using Weights = __m512i;  // centroids + 128, hence the correction that a sum begins with
  using Activation = __m512i;
  static constexpr int kTileRows = 4, kTileVectors = 3, kShallowRows = 48, kShallowBlocks = 4;

  static __m512i begin(int32_t correction) { return _mm512_set1_epi32(correction); }
  static Weights weights(__m512i decoded) { return decoded; }
  static Activation activation(const int8_t* four) { return broadcast_four(four); }
  static __m512i dot(__m512i sum, Weights w, Activation x) { return _mm512_dpbusd_epi32(sum, w, x); }
};

}  // namespace
}  // namespace claq
