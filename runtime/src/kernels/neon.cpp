// AArch64 with the dot-product instructions: byte tables of up to 64 entries look up the centroids of four columns at once.
#include <arm_neon.h>
#include <sys/auxv.h>

#include <cstring>

#include "family.h"
#include "plain_loops.h"

namespace claq {
namespace {

constexpr int kVectors = 4;  // of four outputs: a tile
constexpr int kTile = 4 * kVectors;
constexpr int kPanelBlocks = 16;  // 16 KiB of centroids
constexpr unsigned long kDotProduct = 1ul << 20;  // HWCAP_ASIMDDP

bool supported() { return (getauxval(AT_HWCAP) & kDotProduct) != 0; }

uint32x4_t load_words(const uint32_t* words, int64_t count) {
  if (count >= 4) return vld1q_u32(words);
  uint32_t lanes[4] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i] = words[i];
  return vld1q_u32(lanes);
}

// Tables hold centroids + 128; the dot product here is of signed bytes, so sums need no correction.
uint8x16_t load_entries(const uint8_t* table) { return veorq_u8(vld1q_u8(table), vdupq_n_u8(128)); }

int8x16_t look_up(const uint8_t* table, int width, uint8x16_t index) {
  if (width == 2) return vreinterpretq_s8_u8(vqtbl1q_u8(load_entries(table), index));
  if (width == 3) {
    const uint8x16x2_t entries = {{load_entries(table), load_entries(table + 16)}};
    return vreinterpretq_s8_u8(vqtbl2q_u8(entries, index));
  }
  const uint8x16x4_t entries = {
      {load_entries(table), load_entries(table + 16), load_entries(table + 32), load_entries(table + 48)}};
  return vreinterpretq_s8_u8(vqtbl4q_u8(entries, index));
}

// Four outputs and the block's 32 columns; byte j of lane n of decoded[g] is position 4 * g + j.
void decode(int width, const uint32_t* codes, int64_t row_stride, int64_t count, const uint8_t* table,
            int8x16_t (&decoded)[kGroupsPerBlock]) {
  static constexpr uint8_t kSpread[2][16] = {{0, 0, 1, 1, 4, 4, 5, 5, 8, 8, 9, 9, 12, 12, 13, 13},
                                             {2, 2, 3, 3, 6, 6, 7, 7, 10, 10, 11, 11, 14, 14, 15, 15}};
  uint32x4_t words[4];
  for (int i = 0; i < width; ++i) words[i] = load_words(codes + i * row_stride, count);
  const uint32_t places = width == 4 ? 0x30201000u : width == 3 ? 0x18100800u : 0x0c080400u;
  const uint8x16_t offset = vreinterpretq_u8_u32(vdupq_n_u32(places));
  for (int g = 0; g < kGroupsPerBlock; ++g) {
    uint8x16_t index;
    if (width == 4) {
      index = vandq_u8(vreinterpretq_u8_u32(vshlq_u32(words[g / 2], vdupq_n_s32(-4 * (g % 2)))), vdupq_n_u8(15));
    } else {
      index = vandq_u8(vreinterpretq_u8_u32(vshlq_u32(words[g / 4], vdupq_n_s32(-2 * (g % 4)))), vdupq_n_u8(3));
    }
    if (width == 3) {
      // A byte of columns' third bits: bytes 0 and 2 have those of the four groups in the low half, 1 and 3 in the high one.
      const uint8x16_t bytes = vqtbl1q_u8(vreinterpretq_u8_u32(words[2]), vld1q_u8(kSpread[g / 4]));
      const int8_t low = static_cast<int8_t>(-(g % 4)), high = static_cast<int8_t>(-(g % 4) - 4);
      const int8_t shifts[16] = {low, high, low, high, low, high, low, high, low, high, low, high, low, high, low, high};
      const uint8x16_t third = vandq_u8(vshlq_u8(bytes, vld1q_s8(shifts)), vdupq_n_u8(1));
      index = vorrq_u8(index, vshlq_n_u8(third, 2));
    }
    decoded[g] = look_up(table + ((4 * g) << width), width, vorrq_u8(index, offset));
  }
}

// Calls body(segment, block) for blocks [first, first + count).
template <class Body>
void for_each_block(const LayerView& layer, int64_t first, int64_t count, const Body& body) {
  for (int s = 0; s < layer.segment_count; ++s) {
    const Segment& segment = layer.segments[s];
    for (int64_t block = first; block < first + count; ++block) {
      if (block >= segment.first_block && block < segment.first_block + segment.blocks) body(segment, block);
    }
  }
}

void decode_tile(const LayerView& layer, const Segment& segment, int64_t block, int64_t n, int64_t n1, int vector,
                 int8x16_t (&decoded)[kGroupsPerBlock]) {
  const int64_t b = block - segment.first_block;
  const uint32_t* codes = layer.codes + (segment.first_row + b * segment.width) * layer.out_features + n + 4 * vector;
  const uint8_t* table = layer.table + segment.table_offset + ((b * kBlock) << segment.width);
  decode(segment.width, codes, layer.out_features, n1 - n - 4 * vector, table, decoded);
}

void clear_sums(int64_t rows, int64_t count, float* sums, int64_t stride) {
  for (int64_t m = 0; m < rows; ++m) {
    for (int64_t n = 0; n < count; n += 4) vst1q_f32(sums + m * stride + n, vdupq_n_f32(0));
  }
}

// The group's four activations of kRows rows that are neighbours in their tile; with one row in every lane.
template <int kRows>
int8x16_t load_group(const int8_t* packed) {
  if constexpr (kRows == 1) {
    int32_t four;
    std::memcpy(&four, packed, sizeof four);
    return vreinterpretq_s8_s32(vdupq_n_s32(four));
  } else {
    return vld1q_s8(packed);
  }
}

template <int kRows>
void multiply_tile(const PackedPlace& place, int64_t first_block, int64_t blocks, const int8_t* panel, float* sums, int64_t stride) {
  static_assert(kRows == 1 || kRows == 4);
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t first = (first_block + b) * place.rows;
    int32x4_t acc[kRows][kVectors];
    for (auto& row : acc) {
      for (auto& sum : row) sum = vdupq_n_s32(0);
    }
    for (int g = 0; g < kGroupsPerBlock; ++g) {
      const int8x16_t x = load_group<kRows>(place.quantized + first * kBlock + 4 * g * place.rows);
      for (int v = 0; v < kVectors; ++v) {
        const int8x16_t w = vld1q_s8(panel + ((b * kGroupsPerBlock + g) * kVectors + v) * 16);
        acc[0][v] = vdotq_laneq_s32(acc[0][v], w, x, 0);
        if constexpr (kRows == 4) {
          acc[1][v] = vdotq_laneq_s32(acc[1][v], w, x, 1);
          acc[2][v] = vdotq_laneq_s32(acc[2][v], w, x, 2);
          acc[3][v] = vdotq_laneq_s32(acc[3][v], w, x, 3);
        }
      }
    }
    for (int i = 0; i < kRows; ++i) {
      const float32x4_t factor = vdupq_n_f32(place.scale[first + i]);
      for (int v = 0; v < kVectors; ++v) {
        float* sum = sums + i * stride + 4 * v;
        vst1q_f32(sum, vfmaq_f32(vld1q_f32(sum), vcvtq_f32_s32(acc[i][v]), factor));
      }
    }
  }
}

void sums_int8(const LayerView& layer, const Activations& activations, int64_t m0, int64_t m1, int64_t n0, int64_t n1,
               float* sums, int64_t stride, void* scratch) {
  auto* panel = static_cast<int8_t*>(scratch);
  clear_sums(m1 - m0, n1 - n0, sums, stride);
  for (int64_t n = n0; n < n1; n += kTile) {
    for (int64_t first = 0; first < layer.blocks; first += kPanelBlocks) {
      const int64_t blocks = layer.blocks - first < kPanelBlocks ? layer.blocks - first : kPanelBlocks;
      for_each_block(layer, first, blocks, [&](const Segment& segment, int64_t block) {
        for (int v = 0; v < kVectors; ++v) {
          int8x16_t decoded[kGroupsPerBlock];
          decode_tile(layer, segment, block, n, n1, v, decoded);
          for (int g = 0; g < kGroupsPerBlock; ++g) {
            vst1q_s8(panel + (((block - first) * kGroupsPerBlock + g) * kVectors + v) * 16, decoded[g]);
          }
        }
      });
      int64_t m = m0;
      for (; m + 4 <= m1; m += 4) {
        multiply_tile<4>(packed_place(layer, activations, m), first, blocks, panel, sums + (m - m0) * stride + n - n0, stride);
      }
      for (; m < m1; ++m) {
        multiply_tile<1>(packed_place(layer, activations, m), first, blocks, panel, sums + (m - m0) * stride + n - n0, stride);
      }
    }
  }
}

template <int kRows>
void multiply_float_tile(const float* x, int64_t x_stride, const float* panel, float* sums, int64_t stride) {
  float32x4_t acc[kRows][kVectors];
  for (int i = 0; i < kRows; ++i) {
    for (int v = 0; v < kVectors; ++v) acc[i][v] = vld1q_f32(sums + i * stride + 4 * v);
  }
  for (int column = 0; column < kBlock; ++column) {
    for (int i = 0; i < kRows; ++i) {
      const float32x4_t value = vdupq_n_f32(x[i * x_stride + column]);
      for (int v = 0; v < kVectors; ++v) acc[i][v] = vfmaq_f32(acc[i][v], vld1q_f32(panel + column * kTile + 4 * v), value);
    }
  }
  for (int i = 0; i < kRows; ++i) {
    for (int v = 0; v < kVectors; ++v) vst1q_f32(sums + i * stride + 4 * v, acc[i][v]);
  }
}

void sums_float(const LayerView& layer, const Activations& activations, int64_t m0, int64_t m1, int64_t n0, int64_t n1,
                float* sums, int64_t stride, void* scratch) {
  auto* panel = static_cast<float*>(scratch);
  clear_sums(m1 - m0, n1 - n0, sums, stride);
  for (int64_t n = n0; n < n1; n += kTile) {
    for_each_block(layer, 0, layer.blocks, [&](const Segment& segment, int64_t block) {
      for (int v = 0; v < kVectors; ++v) {
        int8x16_t decoded[kGroupsPerBlock];
        decode_tile(layer, segment, block, n, n1, v, decoded);
        for (int position = 0; position < kBlock; ++position) {
          const int32x4_t lanes = vreinterpretq_s32_s8(decoded[position / 4]);
          const int32x4_t centroid = vshrq_n_s32(vshlq_s32(lanes, vdupq_n_s32(24 - 8 * (position % 4))), 24);
          vst1q_f32(panel + column_of_position(segment.width, position) * kTile + 4 * v, vcvtq_f32_s32(centroid));
        }
      }
      int64_t m = m0;
      const float* x = activations.scaled + block * kBlock;
      for (; m + 4 <= m1; m += 4) {
        multiply_float_tile<4>(x + m * activations.stride, activations.stride, panel, sums + (m - m0) * stride + n - n0, stride);
      }
      for (; m < m1; ++m) {
        multiply_float_tile<1>(x + m * activations.stride, activations.stride, panel, sums + (m - m0) * stride + n - n0, stride);
      }
    });
  }
}

// What is not worth code of its own here: the compiler vectorizes it, or it is little work.
bool prepare_row(const LayerView& layer, const float* x, Activations& activations, int64_t row, bool quantize) {
  return kPortable.prepare_row(layer, x, activations, row, quantize);
}
void add_outliers(const LayerView& layer, const Activations& activations, int64_t m0, int64_t m1, int64_t n0, int64_t n1,
                  float* sums, int64_t stride) {
  kPortable.add_outliers(layer, activations, m0, m1, n0, n1, sums, stride);
}
void finish_row(const LayerView& layer, int64_t n0, int64_t n1, const float* sums, float* y) {
  kPortable.finish_row(layer, n0, n1, sums, y);
}
void half_row_to_float(const uint16_t* from, float* to, int64_t count) { kPortable.half_to_float(from, to, count); }
void float_row_to_half(const float* from, uint16_t* to, int64_t count) { kPortable.float_to_half(from, to, count); }

}  // namespace

const Family kNeon = {"neon", supported, {30e9, 50e9}, {12e9, 35e9}, 1, 1, false, false, kCachedSums, prepare_row, nullptr, nullptr, sums_int8, sums_float,
                      add_outliers, finish_row, half_row_to_float, float_row_to_half, swiglu, add_parts};

}  // namespace claq
