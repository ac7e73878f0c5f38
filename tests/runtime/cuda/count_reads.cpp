// Preloaded: counts how often a package of kernels is opened.
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <dlfcn.h>

#include <atomic>
#include <cstdio>
#include <cstring>

namespace {
std::atomic<int> reads{0};
}

extern "C" FILE* fopen(const char* path, const char* mode) {
  using Open = FILE* (*)(const char*, const char*);
  static const Open next = reinterpret_cast<Open>(dlsym(RTLD_NEXT, "fopen"));
  const char* end = std::strrchr(path, '.');
  if (end && std::strcmp(end, ".kernels") == 0) ++reads;
  return next(path, mode);
}

// How many since the last call.
extern "C" int counted_reads() { return reads.exchange(0); }
