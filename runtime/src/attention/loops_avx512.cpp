// The loops of attention for AVX-512.
#define CLAQ_LANES 16
#include "loops_body.h"

namespace claq::attention {

const Loops kAvx512Loops = kLoops;

}  // namespace claq::attention
