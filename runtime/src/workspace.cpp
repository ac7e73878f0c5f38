#include "workspace.h"

#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

namespace claq {
namespace {

struct Buffer {
  char* data;
  size_t capacity;
};

// Leaked on purpose: a host's threads may still run while static objects are destroyed.
struct FreeList {
  std::mutex mutex;
  std::vector<Buffer> buffers;
};

FreeList& free_list() {
  static auto* list = new FreeList;
  return *list;
}

constexpr size_t kLargestKept = size_t{32} << 20;
constexpr size_t kMostKept = 64;

}  // namespace

Workspace::Workspace(size_t bytes) : data_(nullptr), capacity_(0) {
  if (bytes == 0) return;
  FreeList& list = free_list();
  {
    const std::lock_guard<std::mutex> lock(list.mutex);
    // The smallest that is large enough, so that a task's small need does not take a run's large buffer.
    size_t best = list.buffers.size();
    for (size_t i = 0; i < list.buffers.size(); ++i) {
      if (list.buffers[i].capacity >= bytes &&
          (best == list.buffers.size() || list.buffers[i].capacity < list.buffers[best].capacity)) {
        best = i;
      }
    }
    if (best < list.buffers.size()) {
      data_ = list.buffers[best].data;
      capacity_ = list.buffers[best].capacity;
      list.buffers[best] = list.buffers.back();
      list.buffers.pop_back();
    }
  }
  if (data_) return;
  size_t capacity = 64 * 1024;
  while (capacity < bytes) capacity += capacity / 4 / 64 * 64;
  data_ = static_cast<char*>(std::aligned_alloc(64, capacity));
  if (!data_) throw std::bad_alloc();
  capacity_ = capacity;
}

Workspace::~Workspace() {
  if (!data_) return;
  if (capacity_ <= kLargestKept) {
    FreeList& list = free_list();
    const std::lock_guard<std::mutex> lock(list.mutex);
    if (list.buffers.size() < kMostKept) {
      try {
        list.buffers.push_back({data_, capacity_});
        return;
      } catch (const std::bad_alloc&) {
        // Without room in the list the buffer is freed instead.
      }
    }
  }
  std::free(data_);
}

}  // namespace claq
