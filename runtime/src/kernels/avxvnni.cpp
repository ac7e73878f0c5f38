// AVX2 with the VNNI dot product on 256-bit registers.
#include "avx2_outliers.h"
#include "avx2_sums.h"
#include "plain_loops.h"

namespace claq {
namespace {

bool supported() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") && __builtin_cpu_supports("avxvnni");
}

}  // namespace

const Family kAvxVnni = {"avxvnni", supported, {30e9, 100e9}, {12e9, 35e9}, kRowsAtOnce, kActivationBytes, true, false, kCachedSums, prepare_row, prepare_tile,
                         transpose, sums_int8, sums_float, add_outliers, finish_row, half_row_to_float, float_row_to_half, swiglu, add_parts};

}  // namespace claq
