// Multiples.
#pragma once

#include <cstdint>

namespace claq {

static inline constexpr int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

}  // namespace claq
