// For every family: plain loops, which the compiler vectorizes with the instructions of the file that includes it. Without
// contraction the results are the same bits everywhere.
#pragma once

#include <cstdint>
#include <cstring>

namespace claq {
namespace {

// e^x within 2 ulp for -87 < x < 88, and e^-87 or e^88 beyond. There is no branch, so that loops around it can be vectorized.
inline float exponential(float x) {
  x = x < 88.0f ? x : 88.0f;
  x = x > -87.0f ? x : -87.0f;
  // To the nearest integer by the rounding of an addition whose sum has no bits below one.
  constexpr float kShifter = 12582912.0f;  // 1.5 * 2^23
  const float shifted = x * 1.44269504f + kShifter;
  const float n = shifted - kShifter;
  const float r = x - n * 0.693359375f - n * -2.12194440e-4f;  // ln 2 in two parts, the first of few bits
  // The polynomial of Cephes' expf.
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  int32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits - 0x4b400000 + 127) << 23;  // 2^n, -126 <= n <= 127
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return p * power;
}

// y[i] = gate[i] / (1 + e^-gate[i]) * up[i]; gates below -88 count as -88, but for infinity, which gives a NaN as in the formula.
void swiglu(const float* __restrict gate, const float* __restrict up, float* __restrict y, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const float g = gate[i], bounded = g < -88.0f ? -88.0f : g, negative = g < 0.0f ? g : 0.0f;
    y[i] = (bounded / (1.0f + exponential(-g)) + negative * 0.0f) * up[i];
  }
}

void add_parts(float* sums, int64_t stride, int64_t parts, int64_t count) {
  for (int64_t part = 1; part < parts; ++part) {
    const float* __restrict from = sums + part * stride;
    float* __restrict to = sums;
    for (int64_t i = 0; i < count; ++i) to[i] += from[i];
  }
}

}  // namespace
}  // namespace claq
