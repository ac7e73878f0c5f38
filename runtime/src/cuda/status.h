// Whether the CUDA operators can work on this machine, in words.
#pragma once

#include <string>

namespace claq::cuda {

// True if at least one GPU is there and every GPU has its kernels; `text` says what was found or what is missing.
bool usable(std::string& text);

}  // namespace claq::cuda
