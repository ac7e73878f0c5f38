// The loops of quantization for any CPU.
#define CLAQ_LANES 4
#include "loops_body.h"

namespace claq::quantize {

const Loops kPortableLoops = kLoops;

}  // namespace claq::quantize
