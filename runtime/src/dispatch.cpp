// Chooses a kernel family by the features of the CPU, a name in the layer's descriptor or CLAQ_KERNEL.
#include <cstdlib>
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

}  // namespace

const Family& choose_family(const char* name) {
  const char* source = "kernel";
  if (!name) {
    name = std::getenv("CLAQ_KERNEL");
    source = "CLAQ_KERNEL";
  }
  const bool automatic = !name || !*name || std::string(name) == "auto";
  for (const Family* family : kBestFirst) {
    if (automatic ? family->supported() : std::string(name) == family->name) {
      if (!automatic && !family->supported()) {
        throw InvalidArgument(std::string(source) + ": this CPU cannot run '" + name + "'; it can run: " + family_names());
      }
      return *family;
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
    for (const Family* family : kBestFirst) {
      if (family->supported()) text += (text.empty() ? "" : " ") + std::string(family->name);
    }
    return text;
  }();
  return names.c_str();
}

}  // namespace claq
