// Rows of x and y in the caller's type.
#pragma once

#include <cstdint>

#include "claq.h"
#include "family.h"
#include "half.h"

namespace claq {

// Row `row` of x, of which elements [needed.begin, needed.end) are wanted, as float32: in place, or converted into `buffer`.
inline const float* load_row(const Family& family, claq_dtype dtype, const void* x, int64_t row, int64_t length, Range needed,
                             float* buffer) {
  if (dtype == CLAQ_FLOAT32) return static_cast<const float*>(x) + row * length;
  const uint16_t* from = static_cast<const uint16_t*>(x) + row * length;
  if (dtype == CLAQ_FLOAT16) {
    family.half_to_float(from + needed.begin, buffer + needed.begin, needed.end - needed.begin);
  } else {
    for (int64_t i = needed.begin; i < needed.end; ++i) buffer[i] = bfloat_to_float(from[i]);
  }
  return buffer;
}

inline const float* load_row(const Family& family, claq_dtype dtype, const void* x, int64_t row, int64_t length, float* buffer) {
  return load_row(family, dtype, x, row, length, {0, length}, buffer);
}

// Elements [offset, offset + count) of y, which is float16 or bfloat16.
inline void store_row(const Family& family, claq_dtype dtype, const float* values, int64_t count, void* y, int64_t offset) {
  uint16_t* to = static_cast<uint16_t*>(y) + offset;
  if (dtype == CLAQ_FLOAT16) {
    family.float_to_half(values, to, count);
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = float_to_bfloat(values[i]);
  }
}

}  // namespace claq
