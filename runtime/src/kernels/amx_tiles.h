// The tile registers of AMX: eight of up to sixteen rows of 64 bytes. Written as assembly, because compilers take AMX's intrinsics only
// with options of their own, and older ones let plain loads and stores pass them.
#pragma once

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "avx512_common.h"

namespace claq {
namespace {

// What a tile register is taken to hold; 0 rows: it is not used.
struct TileShape {
  uint8_t rows;
  uint8_t row_bytes;
};

#if defined(CLAQ_EMULATED_TILES)
inline bool tiles_supported() { return true; }
CLAQ_INLINE void load_tile_configuration(const void* bytes) { emulated::load_tile_configuration(bytes); }
CLAQ_INLINE void release_tiles() { emulated::release_tiles(); }
template <int kTile>
CLAQ_INLINE void zero_tile() {
  emulated::zero_tile(kTile);
}
template <int kTile>
CLAQ_INLINE void load_tile(const void* from, int64_t row_stride) {
  emulated::load_tile(kTile, from, row_stride);
}
template <int kTile>
CLAQ_INLINE void store_tile(void* to, int64_t row_stride) {
  emulated::store_tile(kTile, to, row_stride);
}
template <int kSum, int kA, int kB>
CLAQ_INLINE void add_signed_products() {
  emulated::add_signed_products(kSum, kA, kB);
}
#else
// Whether the CPU has tiles of bytes and the system lets this process use them, which it has to be asked for: from then on the state of
// a thread has room for them where a signal is handled, once the thread has used one. Threads and children take it over.
inline bool tiles_supported() {
  constexpr unsigned kFeatures = 7, kTile = 1u << 24, kInt8 = 1u << 25;
  unsigned a, b, c, d;
  if (!__get_cpuid_count(kFeatures, 0, &a, &b, &c, &d) || !(d & kTile) || !(d & kInt8)) return false;
  constexpr unsigned kSaved = 1u << 27;  // of leaf 1: the system manages extended states, and says which
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & kSaved)) return false;
  constexpr uint32_t kTileStates = 3u << 17;
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  if ((low & kTileStates) != kTileStates) return false;
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

CLAQ_INLINE void load_tile_configuration(const void* bytes) {
  __asm__ volatile("ldtilecfg (%0)" : : "r"(bytes) : "memory");
}
// The tile registers go back to how a thread starts, which a switch to another thread need not save.
CLAQ_INLINE void release_tiles() { __asm__ volatile("tilerelease"); }
template <int kTile>
CLAQ_INLINE void zero_tile() {
  __asm__ volatile("tilezero %%tmm%c0" : : "i"(kTile));
}
template <int kTile>
CLAQ_INLINE void load_tile(const void* from, int64_t row_stride) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(row_stride), "i"(kTile) : "memory");
}
template <int kTile>
CLAQ_INLINE void store_tile(void* to, int64_t row_stride) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(row_stride), "i"(kTile) : "memory");
}
// kSum[m][n] += sum over k of kA[m][k] * kB[k / 4][4 * n + k % 4], all signed bytes but for the sums.
template <int kSum, int kA, int kB>
CLAQ_INLINE void add_signed_products() {
  __asm__ volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSum), "i"(kA), "i"(kB));
}
#endif

// A product of two tiles is stored when the next one has been begun, and converted two later: instructions that follow each other more
// closely wait. kProducts are stored in turn.
constexpr int64_t kConverted = 3, kProducts = 4;

inline void configure_tiles(const TileShape (&shapes)[8]) {
  alignas(64) uint8_t bytes[64] = {1};  // the palette, then row bytes as 16 bits each, then rows
  for (int i = 0; i < 8; ++i) {
    bytes[16 + 2 * i] = shapes[i].row_bytes;
    bytes[48 + i] = shapes[i].rows;
  }
  load_tile_configuration(bytes);
}

}  // namespace
}  // namespace claq
