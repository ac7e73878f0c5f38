#include "workspace.h"

#include <atomic>
#include <cstdlib>
#include <new>

namespace claq {
namespace {

// Buffers between runs, by size class. A slot is taken and given back by one atomic exchange: no lock is ever held, so a run
// cannot wait for another one, a signal handler's or a forked child's runs included.
constexpr size_t kSmallest = 64 * 1024;
constexpr size_t kClasses = 30;  // the largest kept buffer is 64 KiB * 1.25^29, about 40 MB
constexpr size_t kSlots = 8;     // kept of each class at most

std::atomic<char*> slots[kClasses][kSlots];  // zero from the start, freed with the process

// The first class whose buffers hold `bytes`, and their capacity; kClasses for larger ones, which are not kept.
size_t size_class(size_t bytes, size_t& capacity) {
  size_t index = 0;
  capacity = kSmallest;
  while (capacity < bytes && index < kClasses) {
    capacity += capacity / 4 / 64 * 64;
    ++index;
  }
  if (index == kClasses) capacity = (bytes + 63) / 64 * 64;
  return index;
}

}  // namespace

Workspace::Workspace(size_t bytes) : data_(nullptr), class_(kClasses) {
  if (bytes == 0) return;
  size_t capacity;
  class_ = size_class(bytes, capacity);
  if (class_ < kClasses) {
    for (std::atomic<char*>& slot : slots[class_]) {
      if (!slot.load(std::memory_order_relaxed)) continue;
      data_ = slot.exchange(nullptr, std::memory_order_acquire);
      if (data_) return;
    }
  }
  data_ = static_cast<char*>(std::aligned_alloc(64, capacity));
  if (!data_) throw std::bad_alloc();
}

Workspace::~Workspace() {
  if (!data_) return;
  if (class_ < kClasses) {
    for (std::atomic<char*>& slot : slots[class_]) {
      char* empty = nullptr;
      if (slot.compare_exchange_strong(empty, data_, std::memory_order_release, std::memory_order_relaxed)) return;
    }
  }
  std::free(data_);
}

}  // namespace claq
