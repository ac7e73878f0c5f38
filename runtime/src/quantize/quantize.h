// The entry points of quantization, and what they share: checks of their arguments and the choice of loops.
#pragma once

#include <cstdint>

#include "../parallel.h"
#include "claq.h"
#include "loops.h"

namespace claq::quantize {

// As claq.h describes them. They throw InvalidArgument, std::bad_alloc.
void quantize_columns(const claq_columns_desc& desc, const Host& host);
void profile_columns(const claq_profile_desc& desc, const Host& host);

// Each throws InvalidArgument.
void check_rows(int64_t rows);
void check_width(int32_t width, int64_t index);
void check_reserve(int64_t reserve, int64_t rows, int64_t index);
const Loops& choose_loops(const char* kernel);

}  // namespace claq::quantize
