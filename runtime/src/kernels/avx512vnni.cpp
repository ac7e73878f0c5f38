// AVX-512 with VBMI and VNNI; see avx512_vbmi.h.
#include "avx512_float.h"
#include "avx512_outliers.h"
#include "avx512_prepare.h"
#include "avx512_vbmi.h"
#include "plain_loops.h"

namespace claq {

const Family kAvx512Vnni = {"avx512vnni", has_vbmi_and_vnni, {60e9, 250e9}, {60e9, 60e9}, kRowsAtOnce, 1, true, gathers, kWideFloatSums, prepare_row, prepare_tile, transpose,
                            sums_int8<Vnni>, sums_float, add_outliers, finish_row, half_row_to_float, float_row_to_half, swiglu, add_parts};

}  // namespace claq
