// Spreading work over the threads of whoever calls the library; it has none of its own but those of thread_pool.cpp.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>

#include "claq.h"
#include "exceptions.h"

namespace claq {

constexpr double kTaskSeconds = 20e-6;        // less work than this is not worth a thread's wake-up
constexpr double kAwakeTaskSeconds = 5e-6;    // the same where threads do not sleep between operators (ONNX Runtime's spin)
constexpr double kShortSeconds = 200e-6;

struct Host {
  claq_parallel_for parallel_for;
  void* context;
  double task_seconds = kTaskSeconds;  // of the smallest task
};

// Runs body(i) for i in [0, total); an exception of a task is passed on after all have ended.
template <class Body>
void for_each(const Host& host, int64_t total, Body body) {
  if (total <= 1 || !host.parallel_for) {
    for (int64_t i = 0; i < total; ++i) body(i);
    return;
  }
  struct Shared {
    Body* body;
    std::atomic<bool> failed{false};
    std::exception_ptr failure;
  } shared;
  shared.body = &body;
  host.parallel_for(
      host.context,
      [](void* data, size_t index) {
        auto* state = static_cast<Shared*>(data);
        ready_to_throw();
        try {
          (*state->body)(static_cast<int64_t>(index));
        } catch (...) {
          if (!state->failed.exchange(true)) state->failure = std::current_exception();
        }
      },
      static_cast<size_t>(total), &shared);
  if (shared.failed) std::rethrow_exception(shared.failure);
}

// Of the machine, known from loading on (a child forked while another thread asks for the first time would wait for it for ever).
extern const int64_t kMachineThreads;

// A host does not say how many threads it has, so it is taken to have the machine's. Short work gets a task for each: more would
// make the stripes of outputs, and with them the runs of code words that lie together, needlessly short. Long work gets two, so
// that a thread which is held up does not hold up all.
inline int64_t task_count(const Host& host, double seconds, int64_t most) {
  if (!host.parallel_for) return 1;
  const int64_t wanted = seconds < kShortSeconds ? kMachineThreads : 2 * kMachineThreads;
  return std::clamp(static_cast<int64_t>(seconds / host.task_seconds), int64_t{1}, std::min(most, wanted));
}

}  // namespace claq
