// Checks of a layer descriptor against every statement of the format.
#pragma once

#include "claq.h"

namespace claq {

// Throws InvalidLayer with a message that names the tensor or attribute, what it holds and what was expected.
void validate(const claq_layer_desc& desc);

}  // namespace claq
