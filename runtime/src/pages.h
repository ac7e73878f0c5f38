// Pages of memory, where the system's ways with them take time or room. Linux only: elsewhere nothing happens.
#pragma once

#include <cstddef>

namespace claq {

// Gives back the whole pages of [data, data + bytes) if a file is mapped there and none of it was changed: they leave this process's
// resident memory, and are read from the file again if they are needed after all. Of other memory, and where the kernel does not say what
// lies there, nothing is given back.
void release_mapped_pages(const void* data, size_t bytes) noexcept;

// Asks for the memory of the whole pages of [data, data + bytes) at once, all of which will be written: each would else be asked for when
// its first byte is, which took longer than to write it. Linux 5.14.
void populate_pages(void* data, size_t bytes) noexcept;

}  // namespace claq
