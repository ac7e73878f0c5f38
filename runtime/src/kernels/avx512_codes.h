// Code words and tables of a block, as the int8 kernels for AVX-512 take them; `Isa` is described in avx512_int8.h.
#pragma once

#include "avx512_common.h"

namespace claq {
namespace {

inline __m512i broadcast_four(const int8_t* values) {
  int32_t four;
  __builtin_memcpy(&four, values, sizeof four);
  return _mm512_set1_epi32(four);
}

// The groups that come out of `words` at step i of 0..3.
template <int kWidth>
constexpr int group_of(int i, int second) {
  return kWidth == 4 ? 2 * i + second : i + 4 * second;
}

// The tables of a block, in registers if kHeld.
template <class Isa, int kWidth, bool kHeld>
struct BlockTables {
  const uint8_t* table;
  typename Isa::Table held[kHeld ? kGroupsPerBlock : 1];

  CLAQ_INLINE explicit BlockTables(const uint8_t* block_table) : table(block_table) {
    if constexpr (kHeld) {
#pragma GCC unroll 8
      for (int g = 0; g < kGroupsPerBlock; ++g) held[g] = Isa::template load_table<kWidth>(table, g);
    }
  }
  CLAQ_INLINE typename Isa::Table operator[](int group) const {
    if constexpr (kHeld) return held[group];
    else return Isa::template load_table<kWidth>(table, group);
  }
};

// The code words of a block for sixteen outputs, loaded where they are used: registers are for sums. WordsHeld are in registers.
template <bool kTail>
struct WordsInMemory {
  const uint32_t* codes;
  int64_t row_stride;
  __mmask16 mask;
  CLAQ_INLINE __m512i operator[](int i) const { return load_words<kTail>(codes + i * row_stride, mask); }
};

template <int kWidth, bool kTail>
struct WordsHeld {
  __m512i rows[kWidth];
  WordsHeld() = default;
  CLAQ_INLINE WordsHeld(const uint32_t* codes, int64_t row_stride, __mmask16 mask) {
#pragma GCC unroll 4
    for (int i = 0; i < kWidth; ++i) rows[i] = load_words<kTail>(codes + i * row_stride, mask);
  }
  CLAQ_INLINE __m512i operator[](int i) const { return rows[i]; }
};

}  // namespace
}  // namespace claq
