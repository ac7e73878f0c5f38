// Loops that the compiler takes apart, and functions that it must inline.
#pragma once

// For steps of inner loops: a call would pass vectors through memory. CLAQ_STEP is the same for a lambda.
#define CLAQ_INLINE inline __attribute__((always_inline))
#define CLAQ_STEP __attribute__((always_inline))

namespace claq {
namespace {

// A number as a type, to choose an instance of a template at run time.
template <int kNumber>
struct Constant {
  static constexpr int kValue = kNumber;
};

// step(Constant<0>()), step(Constant<1>()), ...: a loop whose counter is a constant from the start. Sums in an array that a loop counts
// through are taken to registers only if the loop is unrolled early enough, and a pragma does not do that: they stayed on the stack.
template <int kCount, int kFirst = 0, class Step>
CLAQ_INLINE void unrolled(Step step) {
  if constexpr (kFirst < kCount) {
    step(Constant<kFirst>());
    unrolled<kCount, kFirst + 1>(step);
  }
}

}  // namespace
}  // namespace claq
