// Attention in float32, with or without a cache that grows by the new keys and values.
#pragma once

#include "../layer.h"
#include "../parallel.h"
#include "claq.h"
#include "loops.h"

namespace claq {

// Of batch, heads, kv_heads, rows, tokens, key_size and value_size.
constexpr int64_t kLargestAttentionSize = int64_t{1} << 30;

// Throws InvalidArgument if a size cannot be: one that is too large, or all of them together.
void check_sizes(const claq_attention_desc& attention);

// Those of the family that CLAQ_KERNEL names, or of the best one here. Throws InvalidArgument as choose_family does.
const attention::Loops& choose_attention_loops();

// What claq.h says. Throws InvalidArgument (a size that cannot be, a pointer that is missing), std::bad_alloc.
void attend(const claq_attention_desc& attention, const attention::Loops& loops, const Host& host);

}  // namespace claq
