// Reusable scratch memory: a lease takes a buffer that an earlier one left and leaves it, so that a run allocates only the first
// time and concurrent runs never share.
#pragma once

#include <cstddef>
#include <cstdint>

namespace claq {

class Workspace {
 public:
  // Throws std::bad_alloc. Zero bytes take no buffer.
  explicit Workspace(size_t bytes);
  ~Workspace();
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  // Takes the next `count` elements, aligned to 64 bytes; the constructor's `bytes` must allow for it (see bytes_for).
  template <class T>
  T* take(int64_t count) {
    T* taken = reinterpret_cast<T*>(data_ + used_);
    used_ += bytes_for<T>(count);
    return taken;
  }

  // The whole buffer; null if it was made for no bytes.
  template <class T>
  T* first() const {
    return reinterpret_cast<T*>(data_);
  }

  template <class T>
  static size_t bytes_for(int64_t count) {
    return (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
  }

 private:
  char* data_;
  size_t class_;
  size_t used_ = 0;
};

}  // namespace claq
