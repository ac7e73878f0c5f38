// Threads for hosts that have no way of their own to spread tasks: a small pool whose threads sleep between calls, or the team of
// an OpenMP runtime. Either way they share each call's tasks through one counter.
#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <mutex>
#include <new>
#include <thread>

#if !defined(_WIN32)
#include <pthread.h>
#endif

#include "claq.h"
#include "parallel.h"

namespace claq {

const int64_t kMachineThreads = std::max<int64_t>(1, std::thread::hardware_concurrency());

}  // namespace claq

namespace {

struct Job {
  void (*task)(void*, size_t);
  void* data;
  size_t total;
  std::atomic<size_t> next{0};
};

void work(Job& job) {
  for (size_t i = job.next++; i < job.total; i = job.next++) job.task(job.data, i);
}

class Pool {
 public:
  void run(size_t threads, void (*task)(void*, size_t), size_t total, void* data) {
    Job job{task, data, total};
    // One call at a time has the helpers; others do their own work, which is no slower than waiting for them.
    std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
    if (threads > 1 && total > 1 && turn.owns_lock()) {
      const size_t helpers = start_helpers(threads < total ? threads - 1 : total - 1);
      {
        const std::lock_guard<std::mutex> lock(mutex_);
        job_ = &job;
        wanted_ = helpers;
        ++generation_;
      }
      wake_.notify_all();
      work(job);
      std::unique_lock<std::mutex> lock(mutex_);
      job_ = nullptr;
      idle_.wait(lock, [&] { return busy_ == 0; });
      return;
    }
    work(job);
  }

 private:
  // Fewer threads than asked for is no failure: the caller works too.
  size_t start_helpers(size_t count) {
    try {
      for (; started_ < count; ++started_) std::thread([this] { serve(); }).detach();
    } catch (const std::exception&) {  // no thread, or no memory for one
      return started_;
    }
    return count;
  }

  void serve() {
    std::unique_lock<std::mutex> lock(mutex_);
    uint64_t seen = 0;
    for (;;) {
      wake_.wait(lock, [&] { return generation_ != seen; });
      seen = generation_;
      if (!job_ || wanted_ == 0) continue;
      --wanted_;
      ++busy_;
      Job* job = job_;
      lock.unlock();
      work(*job);
      lock.lock();
      if (--busy_ == 0) idle_.notify_one();
    }
  }

  std::mutex turn_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::condition_variable idle_;
  Job* job_ = nullptr;
  size_t wanted_ = 0;
  size_t busy_ = 0;
  uint64_t generation_ = 0;
  size_t started_ = 0;
};

// Never freed: its threads run until the process ends.
std::atomic<Pool*> current{nullptr};

#if !defined(_WIN32)
// A forked child has none of the threads, and a lock that one of them held then stays locked there: it gets a pool of its own.
const int kRegistered = pthread_atfork(nullptr, nullptr, [] { current.store(nullptr, std::memory_order_release); });
#endif

// Null where there is no memory for one.
Pool* pool() {
  Pool* found = current.load(std::memory_order_acquire);
  if (found) return found;
  Pool* made = new (std::nothrow) Pool;
  if (made && !current.compare_exchange_strong(found, made, std::memory_order_acq_rel)) {
    delete made;
    return found;
  }
  return made;
}

}  // namespace

void claq_pool_parallel_for(void* context, void (*task)(void* data, size_t index), size_t total, void* data) {
  if (Pool* threads = pool()) return threads->run(reinterpret_cast<uintptr_t>(context), task, total, data);
  Job job{task, data, total};
  work(job);
}

void claq_openmp_parallel_for(void* context, void (*task)(void* data, size_t index), size_t total, void* data) {
  const auto* openmp = static_cast<const claq_openmp*>(context);
  Job job{task, data, total};
  openmp->parallel([](void* shared) { work(*static_cast<Job*>(shared)); }, &job, openmp->threads, 0);
}
