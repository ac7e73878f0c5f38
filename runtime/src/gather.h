// Rows of a layer's weight by number: what an embedding looks up.
#pragma once

#include "claq.h"

namespace claq {

// y[i, :] = W[indices[i], :], where an index below zero counts from the end. Every weight is (centroid + outlier) * scale *
// row_scale in float32, rounded in this order, so that all hosts and references agree bit for bit.
// Throws InvalidArgument (an index out of range is named), std::bad_alloc.
void gather(const claq_layer& layer, claq_dtype index_dtype, const void* indices, int64_t count, claq_dtype dtype, void* y,
            claq_parallel_for parallel_for, void* context);

}  // namespace claq
