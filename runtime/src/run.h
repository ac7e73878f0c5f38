// Evaluates a layer: activations once, then tiles of outputs spread over the host's threads.
#pragma once

#include "claq.h"
#include "parallel.h"

namespace claq {

// Where some columns of a product go, in the order of its parts: y[rows, columns].
struct Part {
  void* y;
  int64_t columns;
};

// The product's columns to each of `count` parts, whose columns add up to out_features; of a part without columns y is not touched.
// Throws InvalidArgument, std::bad_alloc.
void run(const claq_layer& layer, claq_dtype dtype, int32_t accuracy_level, const void* x, int64_t rows, const Part* parts, int count,
         const Host& host);

// All columns to one y.
void run(const claq_layer& layer, claq_dtype dtype, int32_t accuracy_level, const void* x, int64_t rows, void* y, const Host& host);

}  // namespace claq
