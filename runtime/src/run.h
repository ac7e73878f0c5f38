// Evaluates a layer: activations once, then tiles of outputs spread over the host's threads.
#pragma once

#include "claq.h"
#include "parallel.h"

namespace claq {

// Throws InvalidArgument, std::bad_alloc.
void run(const claq_layer& layer, claq_dtype dtype, int32_t accuracy_level, const void* x, int64_t rows, void* y, const Host& host);

}  // namespace claq
