// The loops of attention for AVX2.
#define CLAQ_LANES 8
#include "loops_body.h"

namespace claq::attention {

const Loops kAvx2Loops = kLoops;

}  // namespace claq::attention
