// The loops of attention for any CPU.
#define CLAQ_LANES 4
#include "loops_body.h"

namespace claq::attention {

const Loops kPortableLoops = kLoops;

}  // namespace claq::attention
