// AVX2, without a dot-product instruction.
#include "avx2_outliers.h"
#include "avx2_sums.h"
#include "plain_loops.h"

namespace claq {
namespace {

bool supported() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

}  // namespace

const Family kAvx2 = {"avx2", supported, {30e9, 50e9}, {12e9, 35e9}, kRowsAtOnce, kActivationBytes, true, false, kCachedSums, prepare_row, prepare_tile, transpose,
                      sums_int8, sums_float, add_outliers, finish_row, half_row_to_float, float_row_to_half, swiglu, add_parts};

}  // namespace claq
