// AVX-512 with VBMI and VNNI; see avx512_vbmi.h.
#include "avx512_float.h"
#include "avx512_outliers.h"
#include "avx512_prepare.h"
#include "avx512_zen_tiles.h"
#include "plain_loops.h"

namespace claq {
namespace {

void sums_int8_of_cpu(const LayerView& layer, const Activations& activations, int64_t m0, int64_t m1, int64_t n0, int64_t n1, float* sums,
                      int64_t stride, void* scratch) {
  if (layer.tuning == Tuning::kZen) {
    if (m1 - m0 <= Zen::kMostRows) return few_rows_sums<Zen, Zen::kMostRows>(layer, activations, m0, m1, n0, n1, sums, stride);
    if (in_zen_tiles(layer, m1 - m0)) return zen_tile_sums(layer, activations, m0, m1, n0, n1, sums, stride);
  }
  sums_int8<Vnni>(layer, activations, m0, m1, n0, n1, sums, stride, scratch);
}

}  // namespace

const Family kAvx512Vnni = {"avx512vnni", has_vbmi_and_vnni, {60e9, 250e9}, {60e9, 60e9}, kRowsAtOnce, 1, true, true, kWideFloatSums, prepare_row, prepare_tile, transpose,
                            sums_int8_of_cpu, sums_float, add_outliers, finish_row, half_row_to_float, float_row_to_half, swiglu, add_parts};

}  // namespace claq
