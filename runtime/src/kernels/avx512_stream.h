// int8 sums of a few rows of x: codes are read once, in order, and never leave the registers.
#pragma once

#include "avx512_codes.h"

namespace claq {
namespace {

// sums[16 * v] += dot * factor for a tile's rows.
template <int kRows, int kVectors>
CLAQ_INLINE void add_block(const __m512i (&dot)[kRows][kVectors], const float* scale, float* sums, int64_t stride) {
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m) {
    const __m512 factor = _mm512_set1_ps(scale[m]);
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      float* sum = sums + m * stride + 16 * v;
      _mm512_storeu_ps(sum, _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot[m][v]), factor, _mm512_loadu_ps(sum)));
    }
  }
}

// Two vectors of outputs are decoded together for one row of x, where decoding takes all of the time. For more it is no gain.
template <class Isa, int kWidth, int kRows>
constexpr int kStreamTogether = kRows == 1 ? Isa::template kMostTogether<kWidth> : 1;

// What a block's steps share. With one row of x all of it fits into the registers, also its activations as vectors need them that
// have the halves of their lanes exchanged.
template <class Isa, int kWidth, int kRows>
struct BlockOperands {
  static constexpr bool kHeld = kRows == 1, kHeldActivations = kHeld && Isa::held_activations(kWidth);
  static constexpr int kTogether = kStreamTogether<Isa, kWidth, kRows>;
  BlockTables<Isa, kWidth, kHeld && Isa::kHeldTables> tables;
  const int8_t* x;
  typename Isa::Activation activations[kTogether][kHeldActivations ? kGroupsPerBlock : 1];

  CLAQ_INLINE BlockOperands(const uint8_t* block_table, const int8_t* block_x) : tables(block_table), x(block_x) {
    if constexpr (kHeldActivations) {
#pragma GCC unroll 8
      for (int g = 0; g < kGroupsPerBlock; ++g) {
        activations[0][g] = Isa::activation(x + 4 * g);
        if constexpr (kTogether > 1) {
          const int8_t exchanged[4] = {x[4 * g + 2], x[4 * g + 3], x[4 * g], x[4 * g + 1]};
          activations[1][g] = Isa::activation(exchanged);
        }
      }
    }
  }
  // For row m and vector v.
  CLAQ_INLINE typename Isa::Activation activation(int group, int m, int v) const {
    if constexpr (kHeldActivations) return activations[v % kTogether][group];
    else return Isa::activation(x + 4 * (kRows * group + m));
  }
};

// One block, 16 * kVectors outputs; with kTail, `count` of them exist.
template <class Isa, int kWidth, int kRows, int kVectors, bool kTail>
CLAQ_INLINE void stream_step(const uint32_t* codes, int64_t row_stride, int64_t count, const uint32_t* later,
                             const BlockOperands<Isa, kWidth, kRows>& operands, const float* scale, const int32_t* correction,
                             float* sums, int64_t stride) {
  constexpr int kTogether = kStreamTogether<Isa, kWidth, kRows>;
  WordsInMemory<kTail> words[kVectors];
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) {
    words[v] = {codes + 16 * v, row_stride, kTail ? first_lanes(count - 16 * v) : __mmask16{0xffff}};
  }
  __m512i dot[kRows][kVectors];
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) dot[m][v] = Isa::begin(correction[m]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    typename Isa::template Step<kWidth> steps[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      constexpr auto kLevel = Isa::kToSecondLevel ? _MM_HINT_T1 : _MM_HINT_T0;
      if (i < kWidth) _mm_prefetch(reinterpret_cast<const char*>(later + i * row_stride + 16 * v), kLevel);
      if (v % kTogether == 0) steps[v] = Isa::template step<kWidth, kTogether>(words + v, i);
    }
#pragma GCC unroll 2
    for (int second = 0; second < 2; ++second) {
      const int group = group_of<kWidth>(i, second);
      const auto entries = operands.tables[group];
      __m512i decoded[kVectors];
      typename Isa::Weights w[kVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; v += kTogether) {
        if (second) Isa::template decode<kWidth, kTogether, 1>(words + v, steps[v], i, entries, decoded + v);
        else Isa::template decode<kWidth, kTogether, 0>(words + v, steps[v], i, entries, decoded + v);
      }
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) w[v] = Isa::weights(decoded[v]);
#pragma GCC unroll 8
      for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) dot[m][v] = Isa::dot(dot[m][v], w[v], operands.activation(group, m, v));
      }
    }
  }
  add_block<kRows, kVectors>(dot, scale, sums, stride);
}

template <class Isa, int kWidth, int kRows>
constexpr int kStreamVectors = kRows == 1 ? Isa::row_vectors(kWidth) : kRows <= 4 ? Isa::few_rows_vectors(kWidth) : 2;

template <class Isa, int kWidth, int kRows>
void stream_segment(const LayerView& layer, const Segment& segment, const PackedPlace& place, int64_t n0, int64_t n1, float* sums,
                    int64_t stride) {
  constexpr int kVectors = kStreamVectors<Isa, kWidth, kRows>, kTogether = kStreamTogether<Isa, kWidth, kRows>;
  const int64_t row_stride = layer.out_features;
  for (int64_t b = 0; b < segment.blocks; ++b) {
    const int64_t block = segment.first_block + b;
    const BlockOperands<Isa, kWidth, kRows> operands(layer.table + segment.table_offset + ((b * kBlock) << kWidth),
                                                     place.quantized + block * kBlock * kRows);
    const float* scale = place.scale + block * kRows;
    const int32_t* correction = place.correction + block * kRows;
    const uint32_t* codes = layer.codes + (segment.first_row + b * kWidth) * row_stride;
    constexpr int64_t kStep = 16 * kVectors;
    const uint32_t* below = codes + kWidth * row_stride;
    // Of a step below where the codes come from memory, else of the next one, some at a time while this one is decoded.
    const uint32_t* later = codes + (Isa::kToSecondLevel || layer.fetch_ahead ? Isa::rows_ahead(kWidth) * row_stride : kStep);
    int64_t n = n0;
    for (; n + kStep <= n1; n += kStep) {
      const uint32_t* fetched = later + n;
      if (!Isa::kToSecondLevel && !layer.fetch_ahead && n + 2 * kStep > n1) fetched = below + n0;
      stream_step<Isa, kWidth, kRows, kVectors, false>(codes + n, row_stride, kStep, fetched, operands, scale, correction,
                                                       sums + n - n0, stride);
    }
    for (; n < n1; n += 16 * kTogether) {
      stream_step<Isa, kWidth, kRows, kTogether, true>(codes + n, row_stride, n1 - n, later + n, operands, scale, correction,
                                                       sums + n - n0, stride);
    }
  }
}

template <class Isa, int kRows>
void stream(const LayerView& layer, const PackedPlace& place, int64_t n0, int64_t n1, float* sums, int64_t stride) {
  for_segments(layer, [&](const Segment& segment, auto width) CLAQ_STEP {
    stream_segment<Isa, decltype(width)::kValue, kRows>(layer, segment, place, n0, n1, sums, stride);
  });
}

}  // namespace
}  // namespace claq
