// What a thread needs before it can report that memory ran out.
#pragma once

#include <exception>

namespace claq {

// The C++ library allocates a few bytes for each thread that throws, at its first throw, and ends the process if it cannot have
// them. Called at the start of a run, this asks for them while there is memory, so that a later std::bad_alloc becomes a status.
inline void ready_to_throw() noexcept {
  // Volatile: the function is declared pure, and a call whose result nobody reads would be left out.
  volatile int count = std::uncaught_exceptions();
  (void)count;
}

}  // namespace claq
