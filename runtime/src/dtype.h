// Sizes of elements.
#pragma once

#include <cstddef>
#include <cstdint>

#include "claq.h"

namespace claq {

// Bytes of an element of a claq_dtype; 1 for what is none.
static inline constexpr size_t size_of(int32_t dtype) {
  switch (dtype) {
    case CLAQ_INT64: return 8;
    case CLAQ_FLOAT32:
    case CLAQ_INT32:
    case CLAQ_UINT32: return 4;
    case CLAQ_FLOAT16:
    case CLAQ_BFLOAT16:
    case CLAQ_UINT16: return 2;
    default: return 1;
  }
}

}  // namespace claq
