// What the fused operators do with the product of a layer: split its columns, gate one half with the other, add a residual and
// normalize the sum.
#pragma once

#include <array>
#include <cstdint>

#include "claq.h"
#include "layer.h"
#include "parallel.h"

namespace claq {

constexpr int kMostParts = 3;

// Rotary positions of the heads in the first two parts of a product: of each head the first 2 * half values are turned, value i
// together with value i + half, by the angles of the row; the rest stay.
struct Rotary {
  const void *cos, *sin;  // [rows, half], of the type of x; null: nothing is turned
  int64_t half;
  std::array<int64_t, 2> heads;
};

// y_i[rows, parts[i]] = columns of the product x W^T + b, one after another; `parts` add up to out_features, and of a part without
// columns y_i is not touched. Throws as `run`.
void run_split(const claq_layer& layer, claq_dtype dtype, int32_t accuracy_level, const void* x, int64_t rows,
               const std::array<int64_t, kMostParts>& parts, const Rotary& rotary, const std::array<void*, kMostParts>& y,
               const Host& host);

// y[rows, out_features / 2] = silu(first half of the product's columns) * second half; out_features is even. Throws as `run`.
void run_swiglu(const claq_layer& layer, claq_dtype dtype, int32_t accuracy_level, const void* x, int64_t rows, void* y, const Host& host);

// RMS normalization of a sum: normalized = sum / sqrt(mean(sum^2) + epsilon) * weight, over rows of out_features.
struct Norm {
  const void* weight;  // [out_features], of the type of x; null: no normalization
  float epsilon;
  void* normalized;
};

// y[rows, out_features] = product + residual, of the same shape, and its normalization. Throws as `run`.
void run_add(const claq_layer& layer, claq_dtype dtype, int32_t accuracy_level, const void* x, int64_t rows, const void* residual,
             const Norm& norm, void* y, const Host& host);

}  // namespace claq
