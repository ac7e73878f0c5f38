// AVX-512 with VNNI and without VBMI (Cascade Lake): sixteen-entry byte shuffles merged under constant masks, dot products.
#include "avx512_float.h"
#include "avx512_outliers.h"
#include "avx512_prepare.h"
#include "avx512_shuffle.h"
#include "avx512_vnni.h"
#include "plain_loops.h"

namespace claq {
namespace {

bool supported() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
}

struct BwVnni : ShuffleDecoder<0>, VnniProducts {
  static constexpr int rows_ahead(int) { return 3; }
  static constexpr int few_rows_vectors(int width) { return width == 3 ? 3 : 4; }
  static constexpr int row_vectors(int) { return 4; }
  static constexpr bool kToSecondLevel = false;
  static constexpr bool held_activations(int) { return true; }
};

}  // namespace

const Family kAvx512BwVnni = {"avx512bwvnni", supported, {30e9, 150e9}, {20e9, 60e9}, kRowsAtOnce, 1, true, false, kWideFloatSums, prepare_row, prepare_tile, transpose,
                              sums_int8<BwVnni>, sums_float, add_outliers, finish_row, half_row_to_float, float_row_to_half, swiglu, add_parts};

}  // namespace claq
