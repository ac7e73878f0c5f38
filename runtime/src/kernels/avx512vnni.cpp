// AVX-512 with VBMI and VNNI: a code word is a 32-bit lane. One shift and one ternary logic step make four byte indices of a
// lane's four columns, one byte permutation looks up their centroids, one dot-product instruction multiplies them by four
// activations: 64 weights in about four instructions at any width.
#include "avx512_float.h"

namespace claq {
namespace {

bool supported() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni");
}

// The lookup tables of a block's eight groups.
template <int kWidth>
inline __m512i load_table(const uint8_t* table, int group) {
  const uint8_t* entries = table + ((4 * group) << kWidth);
  if constexpr (kWidth == 4) return _mm512_loadu_si512(entries);
  if constexpr (kWidth == 3) return _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(entries)));
  return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(entries)));
}

// Centroids + 128 of sixteen outputs and the block's 32 columns; byte j of lane n of decoded[g] is position 4 * g + j.
template <int kWidth>
inline void decode(const __m512i (&words)[kWidth], const __m512i (&table)[kGroupsPerBlock], __m512i (&decoded)[kGroupsPerBlock]) {
  if constexpr (kWidth == 4) {
    const __m512i mask = _mm512_set1_epi8(15), offset = _mm512_set1_epi32(0x30201000);
#pragma GCC unroll 8
    for (int g = 0; g < kGroupsPerBlock; ++g) {
      const __m512i codes = g % 2 ? _mm512_srli_epi32(words[g / 2], 4) : words[g / 2];
      decoded[g] = _mm512_permutexvar_epi8(_mm512_ternarylogic_epi32(codes, mask, offset, 0xea), table[g]);
    }
  } else if constexpr (kWidth == 2) {
    const __m512i mask = _mm512_set1_epi8(3), offset = _mm512_set1_epi32(0x0c080400);
#pragma GCC unroll 8
    for (int g = 0; g < kGroupsPerBlock; ++g) {
      const __m512i codes = g % 4 ? _mm512_srli_epi32(words[g / 4], 2 * (g % 4)) : words[g / 4];
      decoded[g] = _mm512_shuffle_epi8(table[g], _mm512_ternarylogic_epi32(codes, mask, offset, 0xea));
    }
  } else {
    // `spread` keeps the third bit of columns g, 4 + g, ... , 28 + g in bit 0 of its nibbles, and above it the two bits of
    // the column's place among four, which become bits 3 and 4 of the index. The six bits from two below a nibble are then
    // an index but for its low two bits, which come from the words.
    const __m512i mask = _mm512_set1_epi8(3), nibbles = _mm512_set1_epi32(0x11111111), places = _mm512_set1_epi32(0x64206420);
    const __m512i starts[2] = {_mm512_set1_epi64(0x2a26221e0a06023e), _mm512_set1_epi64(0x3a36322e1a16120e)};
    __m512i spread[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      spread[i] = _mm512_ternarylogic_epi32(i ? _mm512_srli_epi32(words[2], i) : words[2], nibbles, places, 0xea);
    }
#pragma GCC unroll 8
    for (int g = 0; g < kGroupsPerBlock; ++g) {
      const __m512i low = g % 4 ? _mm512_srli_epi32(words[g / 4], 2 * (g % 4)) : words[g / 4];
      const __m512i high = _mm512_multishift_epi64_epi8(starts[g / 4], spread[g % 4]);
      decoded[g] = _mm512_permutexvar_epi8(_mm512_ternarylogic_epi32(low, high, mask, 0xe4), table[g]);
    }
  }
}

inline __m512i broadcast_four(const int8_t* values) { return _mm512_set1_epi32(*reinterpret_cast<const int32_t*>(values)); }

// ---- up to eight rows of x: codes are read once, in order, and never leave the registers

template <int kWidth, int kRows, bool kTail>
inline void stream_step(const uint32_t* codes, int64_t row_stride, __mmask16 mask, const __m512i (&table)[kGroupsPerBlock],
                        const int8_t* const (&x)[kRows], const float (&scale)[kRows], const int32_t (&correction)[kRows],
                        float* sums, int64_t stride) {
  __m512i words[kWidth], decoded[kGroupsPerBlock];
#pragma GCC unroll 4
  for (int i = 0; i < kWidth; ++i) words[i] = load_words<kTail>(codes + i * row_stride, mask);
  decode<kWidth>(words, table, decoded);
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m) {
    __m512i dot = _mm512_set1_epi32(correction[m]);
#pragma GCC unroll 8
    for (int g = 0; g < kGroupsPerBlock; ++g) dot = _mm512_dpbusd_epi32(dot, decoded[g], broadcast_four(x[m] + 4 * g));
    const __m512 sum = _mm512_loadu_ps(sums + m * stride);
    _mm512_storeu_ps(sums + m * stride, _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), _mm512_set1_ps(scale[m]), sum));
  }
}

template <int kWidth, int kRows>
inline void stream_segment(const LayerView& layer, const Segment& segment, const Activations& activations, int64_t m0, int64_t n0,
                           int64_t n1, float* sums, int64_t stride) {
  const int64_t full = n0 + (n1 - n0) / 16 * 16;
  for (int64_t b = 0; b < segment.blocks; ++b) {
    const int64_t block = segment.first_block + b;
    __m512i table[kGroupsPerBlock];
#pragma GCC unroll 8
    for (int g = 0; g < kGroupsPerBlock; ++g) {
      table[g] = load_table<kWidth>(layer.table + segment.table_offset + ((b * kBlock) << kWidth), g);
    }
    const int8_t* x[kRows];
    float scale[kRows];
    int32_t correction[kRows];
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
      x[m] = activations.quantized + (m0 + m) * activations.stride + block * kBlock;
      scale[m] = activations.block_scale[(m0 + m) * activations.block_stride + block];
      correction[m] = activations.block_correction[(m0 + m) * activations.block_stride + block];
    }
    const uint32_t* codes = layer.codes + (segment.first_row + b * kWidth) * layer.out_features;
    for (int64_t n = n0; n < full; n += 16) {
      stream_step<kWidth, kRows, false>(codes + n, layer.out_features, 0xffff, table, x, scale, correction, sums + n - n0, stride);
    }
    if (full < n1) {
      stream_step<kWidth, kRows, true>(codes + full, layer.out_features, first_lanes(n1 - full), table, x, scale, correction,
                                       sums + full - n0, stride);
    }
  }
}

template <int kRows>
void stream(const LayerView& layer, const Activations& activations, int64_t m0, int64_t n0, int64_t n1, float* sums, int64_t stride) {
  for (int s = 0; s < layer.segment_count; ++s) {
    const Segment& segment = layer.segments[s];
    switch (segment.width) {
      case 4: stream_segment<4, kRows>(layer, segment, activations, m0, n0, n1, sums, stride); break;
      case 3: stream_segment<3, kRows>(layer, segment, activations, m0, n0, n1, sums, stride); break;
      default: stream_segment<2, kRows>(layer, segment, activations, m0, n0, n1, sums, stride); break;
    }
  }
}

// ---- more rows: a panel of kVectors * 16 outputs is decoded and multiplied by tiles of rows

constexpr int kPanelBlocks = 16;

template <int kWidth, int kVectors>
inline void decode_panel_block(const uint8_t* entries, const uint32_t* codes, int64_t row_stride,
                               const __mmask16 (&masks)[kVectors], uint8_t* panel) {
  __m512i table[kGroupsPerBlock];
#pragma GCC unroll 8
  for (int g = 0; g < kGroupsPerBlock; ++g) table[g] = load_table<kWidth>(entries, g);
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    __m512i words[kWidth], decoded[kGroupsPerBlock];
#pragma GCC unroll 4
    for (int i = 0; i < kWidth; ++i) {
      words[i] = load_words<true>(codes + i * row_stride + 16 * v, masks[v]);
      // The next panel's words of this row; a panel is too narrow a stripe for the hardware to see the pattern.
      _mm_prefetch(reinterpret_cast<const char*>(codes + i * row_stride + 16 * (v + kVectors)), _MM_HINT_T1);
    }
    decode<kWidth>(words, table, decoded);
#pragma GCC unroll 8
    for (int g = 0; g < kGroupsPerBlock; ++g) _mm512_store_si512(panel + (g * kVectors + v) * 64, decoded[g]);
  }
}

template <int kVectors>
void decode_panel(const LayerView& layer, int64_t first_block, int64_t blocks, int64_t n, int64_t n1, uint8_t* panel) {
  __mmask16 masks[kVectors];
  for (int v = 0; v < kVectors; ++v) masks[v] = n1 - n > 16 * v ? first_lanes(n1 - n - 16 * v) : 0;
  for (int s = 0; s < layer.segment_count; ++s) {
    const Segment& segment = layer.segments[s];
    for (int64_t block = first_block; block < first_block + blocks; ++block) {
      const int64_t b = block - segment.first_block;
      if (b < 0 || b >= segment.blocks) continue;
      const uint8_t* entries = layer.table + segment.table_offset + ((b * kBlock) << segment.width);
      const uint32_t* codes = layer.codes + (segment.first_row + b * segment.width) * layer.out_features + n;
      uint8_t* to = panel + (block - first_block) * kGroupsPerBlock * kVectors * 64;
      switch (segment.width) {
        case 4: decode_panel_block<4, kVectors>(entries, codes, layer.out_features, masks, to); break;
        case 3: decode_panel_block<3, kVectors>(entries, codes, layer.out_features, masks, to); break;
        default: decode_panel_block<2, kVectors>(entries, codes, layer.out_features, masks, to); break;
      }
    }
  }
}

template <int kRows, int kVectors>
inline void multiply_tile(const Activations& activations, int64_t m, int64_t first_block, int64_t blocks, const uint8_t* panel,
                          float* sums, int64_t stride) {
  const int8_t* x = activations.quantized + m * activations.stride + first_block * kBlock;
  const float* scale = activations.block_scale + m * activations.block_stride + first_block;
  const int32_t* correction = activations.block_correction + m * activations.block_stride + first_block;
  for (int64_t b = 0; b < blocks; ++b) {
    __m512i acc[kRows][kVectors];
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) acc[i][v] = _mm512_set1_epi32(correction[i * activations.block_stride + b]);
    }
#pragma GCC unroll 8
    for (int g = 0; g < kGroupsPerBlock; ++g) {
      __m512i w[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) w[v] = _mm512_load_si512(panel + ((b * kGroupsPerBlock + g) * kVectors + v) * 64);
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
        const __m512i four = broadcast_four(x + i * activations.stride + b * kBlock + 4 * g);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) acc[i][v] = _mm512_dpbusd_epi32(acc[i][v], w[v], four);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const __m512 factor = _mm512_set1_ps(scale[i * activations.block_stride + b]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        float* sum = sums + i * stride + 16 * v;
        _mm512_storeu_ps(sum, _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc[i][v]), factor, _mm512_loadu_ps(sum)));
      }
    }
  }
}

template <int kVectors>
void panel_sums(const LayerView& layer, const Activations& activations, int64_t m0, int64_t m1, int64_t n, int64_t n1, float* sums,
                int64_t stride, uint8_t* panel) {
  for (int64_t block = 0; block < layer.blocks; block += kPanelBlocks) {
    const int64_t blocks = layer.blocks - block < kPanelBlocks ? layer.blocks - block : kPanelBlocks;
    decode_panel<kVectors>(layer, block, blocks, n, n1, panel);
    int64_t m = m0;
    const auto tile = [&](auto rows) {
      constexpr int kRows = decltype(rows)::kValue;
      multiply_tile<kRows, kVectors>(activations, m, block, blocks, panel, sums + (m - m0) * stride, stride);
      m += kRows;
    };
    while (m1 - m >= 8) tile(Constant<8>{});
    switch (m1 - m) {
      case 7: tile(Constant<7>{}); break;
      case 6: tile(Constant<6>{}); break;
      case 5: tile(Constant<5>{}); break;
      case 4: tile(Constant<4>{}); break;
      case 3: tile(Constant<3>{}); break;
      case 2: tile(Constant<2>{}); break;
      case 1: tile(Constant<1>{}); break;
      default: break;
    }
  }
}

void sums_int8(const LayerView& layer, const Activations& activations, int64_t m0, int64_t m1, int64_t n0, int64_t n1, float* sums,
               int64_t stride, void* scratch) {
  clear_sums(m1 - m0, n1 - n0, sums, stride);
  switch (m1 - m0) {
    case 1: return stream<1>(layer, activations, m0, n0, n1, sums, stride);
    case 2: return stream<2>(layer, activations, m0, n0, n1, sums, stride);
    case 3: return stream<3>(layer, activations, m0, n0, n1, sums, stride);
    case 4: return stream<4>(layer, activations, m0, n0, n1, sums, stride);
    case 5: return stream<5>(layer, activations, m0, n0, n1, sums, stride);
    case 6: return stream<6>(layer, activations, m0, n0, n1, sums, stride);
    case 7: return stream<7>(layer, activations, m0, n0, n1, sums, stride);
    case 8: return stream<8>(layer, activations, m0, n0, n1, sums, stride);
    default: break;
  }
  auto* panel = static_cast<uint8_t*>(scratch);
  for (int64_t n = n0; n < n1; n += 48) {
    const int64_t left = n1 - n;
    float* tile = sums + n - n0;
    if (left > 32) panel_sums<3>(layer, activations, m0, m1, n, n1, tile, stride, panel);
    else if (left > 16) panel_sums<2>(layer, activations, m0, m1, n, n1, tile, stride, panel);
    else panel_sums<1>(layer, activations, m0, m1, n, n1, tile, stride, panel);
  }
}

}  // namespace

const Family kAvx512Vnni = {"avx512vnni", supported,  prepare_row,       transpose,        sums_int8, sums_float,
                            add_outliers, finish_row, half_row_to_float, float_row_to_half};

}  // namespace claq
