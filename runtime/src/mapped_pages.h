// Pages of mapped files that nothing needs any more.
#pragma once

#include <cstddef>

namespace claq {

// Gives back the whole pages of [data, data + bytes) if a file is mapped there and none of it was changed: they leave this process's
// resident memory, and are read from the file again if they are needed after all. Of other memory nothing is given back. Linux only;
// elsewhere, and where the kernel does not say what lies there, nothing happens.
void release_mapped_pages(const void* data, size_t bytes) noexcept;

}  // namespace claq
