// The loops of quantization for AVX-512.
#define CLAQ_LANES 16
#include "loops_body.h"

namespace claq::quantize {

const Loops kAvx512Loops = kLoops;

}  // namespace claq::quantize
