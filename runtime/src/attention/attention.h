// Attention in float32, with or without a cache that grows by the new keys and values.
#pragma once

#include "../layer.h"
#include "../parallel.h"
#include "claq.h"
#include "loops.h"

namespace claq {

// Those of the family that CLAQ_KERNEL names, or of the best one here. Throws InvalidArgument as choose_family does.
const attention::Loops& choose_attention_loops();

// What claq.h says. Throws InvalidArgument (a size that cannot be, a pointer that is missing), std::bad_alloc.
void attend(const claq_attention_desc& attention, const attention::Loops& loops, const Host& host);

}  // namespace claq
