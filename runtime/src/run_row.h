// One row of x, as in a decoding step of a language model. The work is mostly reading code words, and it is the columns that are
// shared out between threads, not the outputs: a thread then reads whole rows of code words, one after another, and makes the
// look-up tables of its own columns only.
#pragma once

#include <cstdint>

#include "claq.h"
#include "layer.h"
#include "parallel.h"

namespace claq {

// Into how many parts the columns of a layer are split for one row of x; 1: the outputs are shared out instead. It depends on
// the layer alone, and with it the order of all sums: results are the same with any number of threads.
int64_t column_parts(const LayerView& layer);

// y = layer(x) for one row by parts of the columns. Throws std::bad_alloc.
void run_row(const Family& family, const LayerView& layer, claq_dtype dtype, bool int8, const void* x, void* y, const Host& host);

}  // namespace claq
