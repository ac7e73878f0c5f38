// The loops of quantization for AVX2.
#define CLAQ_LANES 8
#include "loops_body.h"

namespace claq::quantize {

const Loops kAvx2Loops = kLoops;

}  // namespace claq::quantize
