// Vectors of CLAQ_LANES floats for loops in plain C++ that are compiled once for each width. Free of C++ library code, so that no
// instance of a shared inline function compiled here is called on a CPU without the instructions.
#pragma once

#include <cstring>

namespace claq {
namespace {

typedef float Vector __attribute__((vector_size(CLAQ_LANES * sizeof(float))));

inline Vector load(const float* from) {
  Vector value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

inline void store(float* to, Vector value) { std::memcpy(to, &value, sizeof value); }

}  // namespace
}  // namespace claq
