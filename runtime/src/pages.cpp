#include "pages.h"

#if defined(__linux__)
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#endif

namespace claq {

#if defined(__linux__)
namespace {

// The pages that lie in [data, data + bytes) as a whole, by their numbers.
struct Pages {
  uint64_t first, count, size;
  void* data() const { return reinterpret_cast<void*>(first * size); }
  size_t bytes() const { return count * size; }
};

Pages whole_pages(const void* data, size_t bytes) {
  const auto size = static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
  const auto begin = reinterpret_cast<uintptr_t>(data);
  const uint64_t first = (begin + size - 1) / size, end = (begin + bytes) / size;
  return {first, end > first ? end - first : 0, size};
}

// Bits of an entry of /proc/self/pagemap (Documentation/admin-guide/mm/pagemap.rst of Linux), which any process may read of itself.
constexpr uint64_t kPresent = uint64_t{1} << 63, kSwapped = uint64_t{1} << 62, kOfFile = uint64_t{1} << 61;

// Whether each of `count` pages from number `first` on is a file's (or memory that is shared like one), or not in memory at all. A page
// of a private mapping that was written to is neither: to give it back would undo what was written.
bool all_of_files(int pagemap, uint64_t first, uint64_t count) {
  constexpr uint64_t kAtOnce = 256;
  uint64_t entries[kAtOnce];
  while (count > 0) {
    const uint64_t some = std::min(count, kAtOnce);
    const size_t bytes = static_cast<size_t>(some) * sizeof(uint64_t);
    if (pread(pagemap, entries, bytes, static_cast<off_t>(first * sizeof(uint64_t))) != static_cast<ssize_t>(bytes)) return false;
    for (uint64_t i = 0; i < some; ++i) {
      if ((entries[i] & kSwapped) || ((entries[i] & kPresent) && !(entries[i] & kOfFile))) return false;
    }
    first += some;
    count -= some;
  }
  return true;
}

}  // namespace

void release_mapped_pages(const void* data, size_t bytes) noexcept {
  const Pages pages = whole_pages(data, bytes);
  if (pages.count == 0) return;
  const int pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
  if (pagemap < 0) return;
  if (all_of_files(pagemap, pages.first, pages.count)) madvise(pages.data(), pages.bytes(), MADV_DONTNEED);
  close(pagemap);
}

void populate_pages(void* data, size_t bytes) noexcept {
  constexpr int kPopulateWrite = 23;  // MADV_POPULATE_WRITE, which older headers lack; kernels that do refuse it
  const Pages pages = whole_pages(data, bytes);
  if (pages.count > 0) madvise(pages.data(), pages.bytes(), kPopulateWrite);
}
#else
void release_mapped_pages(const void*, size_t) noexcept {}
void populate_pages(void*, size_t) noexcept {}
#endif

}  // namespace claq
