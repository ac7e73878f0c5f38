// What makes a difference between processors that have the same instructions. None of it changes a result.
#pragma once

#include <cstdint>

namespace claq {

enum class Tuning : uint8_t {
  kPlain,
  // One instruction that loads sixteen floats takes less time than sixteen: Intel's cores from Sapphire Rapids on.
  kGathers,
  // AMD's cores: few lines can be on their way to the first-level cache at a time (24 on Zen 4), many more to the second.
  kZen,
};

// What CLAQ_TUNING says (plain, gathers or zen, for tests), else that of this CPU. Throws InvalidArgument for another name.
Tuning choose_tuning();

}  // namespace claq
