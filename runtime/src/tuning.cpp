#include "tuning.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <string>

#include "layer.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace claq {
namespace {

constexpr struct {
  const char* name;
  Tuning tuning;
} kNames[] = {{"plain", Tuning::kPlain}, {"gathers", Tuning::kGathers}, {"zen", Tuning::kZen}};

#if defined(__x86_64__)
Tuning ask_cpu() {
  unsigned a, b, c, d;
  if (!__get_cpuid(0, &a, &b, &c, &d)) return Tuning::kPlain;
  char vendor[13] = {};
  std::memcpy(vendor, &b, 4);
  std::memcpy(vendor + 4, &d, 4);
  std::memcpy(vendor + 8, &c, 4);
  if (std::strcmp(vendor, "AuthenticAMD") == 0 || std::strcmp(vendor, "HygonGenuine") == 0) return Tuning::kZen;
  // Sapphire Rapids and its kin are told by AVX512-FP16; Ice Lake's microcode makes gathers slow. Not __builtin_cpu_supports, which
  // knows this feature from GCC 12 on only.
  constexpr unsigned kFeatures = 7, kFp16 = 1u << 23;
  return __get_cpuid_count(kFeatures, 0, &a, &b, &c, &d) && (d & kFp16) ? Tuning::kGathers : Tuning::kPlain;
}
#else
Tuning ask_cpu() { return Tuning::kPlain; }
#endif

// Asked once, and not by a static variable that is set where it is first seen; see dispatch.cpp.
Tuning of_cpu() {
  constexpr int kUnknown = -1;
  static std::atomic<int> known{kUnknown};
  int value = known.load(std::memory_order_relaxed);
  if (value == kUnknown) {
    value = static_cast<int>(ask_cpu());
    known.store(value, std::memory_order_relaxed);
  }
  return static_cast<Tuning>(value);
}

}  // namespace

Tuning choose_tuning() {
  const char* wanted = std::getenv("CLAQ_TUNING");
  if (!wanted || !*wanted) return of_cpu();
  for (const auto& each : kNames) {
    if (std::strcmp(each.name, wanted) == 0) return each.tuning;
  }
  throw InvalidArgument(std::string("CLAQ_TUNING: is '") + wanted + "', expected plain, gathers or zen");
}

}  // namespace claq
