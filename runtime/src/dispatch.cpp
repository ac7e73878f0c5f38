// Chooses a kernel family by the features of the CPU, a name in the layer's descriptor or CLAQ_KERNEL.
#include <atomic>
#include <cstdlib>
#include <iterator>
#include <string>

#include "family.h"
#include "layer.h"

namespace claq {
namespace {

constexpr const Family* kBestFirst[] = {
#if defined(__x86_64__)
    &kAvx512Amx, &kAvx512Vnni, &kAvx512BwVnni, &kAvx512Bw, &kAvxVnni, &kAvx2,
#endif
#if defined(__aarch64__)
    &kNeon,
#endif
    &kPortable,
};

// Asked once and remembered: a virtual machine is left for each question to the CPU, which takes tens of microseconds. Not a static
// variable that is set where it is first seen: a child that is forked meanwhile would wait for it for ever.
enum class Answer : int8_t { kUnknown, kNo, kYes };

std::atomic<Answer> known[std::size(kBestFirst)];

bool supported(size_t i) {
  if (known[i].load(std::memory_order_relaxed) == Answer::kUnknown) {
    known[i].store(kBestFirst[i]->supported() ? Answer::kYes : Answer::kNo, std::memory_order_relaxed);
  }
  return known[i].load(std::memory_order_relaxed) == Answer::kYes;
}

}  // namespace

const Family& choose_family(const char* name) {
  const char* source = "kernel";
  if (!name) {
    name = std::getenv("CLAQ_KERNEL");
    source = "CLAQ_KERNEL";
  }
  const bool automatic = !name || !*name || std::string(name) == "auto";
  for (size_t i = 0; i < std::size(kBestFirst); ++i) {
    if (automatic ? supported(i) : std::string(name) == kBestFirst[i]->name) {
      if (!automatic && !supported(i)) {
        throw InvalidArgument(std::string(source) + ": this CPU cannot run '" + name + "'; it can run: " + family_names());
      }
      return *kBestFirst[i];
    }
  }
  throw InvalidArgument(std::string(source) + ": no kernel family is called '" + name + "'; this CPU can run: " +
                        family_names());
}

Vectors choose_vectors(const char* name) {
  const std::string family = choose_family(name).name;
  if (family.rfind("avx512", 0) == 0) return Vectors::kAvx512;
  return family.rfind("avx", 0) == 0 ? Vectors::kAvx2 : Vectors::kPortable;
}

const char* family_names() {
  static const std::string names = [] {
    std::string text;
    for (size_t i = 0; i < std::size(kBestFirst); ++i) {
      if (supported(i)) text += (text.empty() ? "" : " ") + std::string(kBestFirst[i]->name);
    }
    return text;
  }();
  return names.c_str();
}

}  // namespace claq
