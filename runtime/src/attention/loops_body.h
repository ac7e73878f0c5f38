// The bodies of loops.h in plain C++ with vectors of CLAQ_LANES floats; products and sums may be contracted here. Free of C++ library
// code, so that no instance of a shared inline function compiled here is called on a CPU without the instructions.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include "../half_vectors.h"
#include "../vectors.h"
#include "loops.h"

namespace claq::attention {
namespace {

typedef int32_t Lanes __attribute__((vector_size(CLAQ_LANES * sizeof(int32_t))));

constexpr int64_t kLanes = CLAQ_LANES;
constexpr int64_t kPanel = 2 * kLanes;
// Accumulators that fit into the registers: 32 with AVX-512, else 16.
constexpr int kMostRows = kLanes == 16 ? 12 : 6;   // of a product, two vectors each
constexpr int kScoreRows = kLanes == 16 ? 4 : 2;   // of scores, kScoreTokens vectors each
constexpr int kScoreTokens = 4;

inline Vector broadcast(float value) { return value - Vector{}; }

// Copies a vector that was loaded from there.
inline void copy_lanes(const float*, float* to, Vector loaded) { store(to, loaded); }
inline void copy_lanes(const uint16_t* from, uint16_t* to, Vector) { std::memcpy(to, from, CLAQ_LANES * sizeof(uint16_t)); }

// Adds lanes that are a distance apart, those of two vectors into one: lanes with that bit of their number come from the second.
template <int Distance, int... Lane>
inline Vector add_apart(Vector a, Vector b, std::integer_sequence<int, Lane...>) {
  return __builtin_shufflevector(a, b, (Lane & Distance ? CLAQ_LANES + Lane - Distance : Lane)...) +
         __builtin_shufflevector(a, b, (Lane & Distance ? CLAQ_LANES + Lane : Lane + Distance)...);
}

template <int Distance>
inline void add_lanes(Vector* parts) {
  for (int i = 0; i < Distance; ++i) {
    parts[i] = add_apart<Distance>(parts[i], parts[i + Distance], std::make_integer_sequence<int, CLAQ_LANES>());
  }
  if constexpr (Distance > 1) add_lanes<Distance / 2>(parts);
}

// Lane i of the result is the sum over the lanes of vector i of `from`.
inline Vector sum_each(const float* from) {
  Vector parts[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) parts[i] = load(from + i * kLanes);
  add_lanes<CLAQ_LANES / 2>(parts);
  return parts[0];
}

// The addresses of `Count` rows from `first` on, and where their copies go; the last row stands for those behind it.
template <class Element, int Count>
struct Places {
  Places(const Element* data, int64_t stride, Element* copies, int64_t size, int64_t first, int64_t count) {
    for (int i = 0; i < Count; ++i) {
      const int64_t row = first + i < count ? first + i : count - 1;
      from[i] = data + row * stride;
      to[i] = copies ? copies + row * size : nullptr;
    }
  }
  const Element* from[Count];
  Element* to[Count];
};

template <class Element, int Count, bool Copies>
void score_rows(const float* query, const Element* keys, int64_t key_stride, int64_t tokens, int64_t size, float* scores, int64_t stride,
                Element* copy) {
  const int64_t whole = size / kLanes * kLanes;
  for (int64_t t0 = 0; t0 < tokens; t0 += kLanes) {
    alignas(64) float parts[Count][kLanes][kLanes];
    for (int64_t t = 0; t < kLanes; t += kScoreTokens) {
      const Places<Element, kScoreTokens> key(keys, key_stride, copy, size, t0 + t, tokens);
      Vector sums[Count][kScoreTokens] = {};
      for (int64_t k = 0; k < whole; k += kLanes) {
        for (int i = 0; i < kScoreTokens; ++i) {
          const Vector some = load(key.from[i] + k);
          if constexpr (Copies) copy_lanes(key.from[i] + k, key.to[i] + k, some);
          for (int r = 0; r < Count; ++r) sums[r][i] += some * load(query + r * size + k);
        }
      }
      for (int r = 0; r < Count; ++r) {
        for (int i = 0; i < kScoreTokens; ++i) store(parts[r][t + i], sums[r][i]);
      }
      // Features that fill no vector are added to the first lanes.
      for (int64_t k = whole; k < size; ++k) {
        for (int i = 0; i < kScoreTokens; ++i) {
          const float one = load_one(key.from[i] + k);
          if constexpr (Copies) key.to[i][k] = key.from[i][k];
          for (int r = 0; r < Count; ++r) parts[r][t + i][k - whole] += one * query[r * size + k];
        }
      }
    }
    for (int r = 0; r < Count; ++r) store(scores + r * stride + t0, sum_each(parts[r][0]));
  }
}

template <class Element>
void scores(const float* query, int64_t rows, const Element* keys, int64_t key_stride, int64_t tokens, int64_t size, float* scores,
            int64_t stride, Element* copy) {
  int64_t r = 0;
  const auto run = [&](auto plain, auto copies, int64_t count) {
    for (; r + count <= rows; r += count) {
      (copy && r == 0 ? copies : plain)(query + r * size, keys, key_stride, tokens, size, scores + r * stride, stride, copy);
    }
  };
  if constexpr (kScoreRows == 4) {
    run(score_rows<Element, 4, false>, score_rows<Element, 4, true>, 4);
    run(score_rows<Element, 3, false>, score_rows<Element, 3, true>, 3);
  }
  run(score_rows<Element, 2, false>, score_rows<Element, 2, true>, 2);
  run(score_rows<Element, 1, false>, score_rows<Element, 1, true>, 1);
}

void turn(const float* keys, int64_t key_stride, int64_t tokens, int64_t size, float* turned) {
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t i = 0; i < size; ++i) turned[i * kPanel + t] = keys[t * key_stride + i];
  }
  for (int64_t i = 0; tokens < kPanel && i < size; ++i) {
    for (int64_t t = tokens; t < kPanel; ++t) turned[i * kPanel + t] = 0;
  }
}

template <int Rows, int Vectors>
void product_tile(bool add, const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t depth, float* c, int64_t c_stride) {
  Vector sums[Rows][Vectors];
  for (int r = 0; r < Rows; ++r) {
    for (int v = 0; v < Vectors; ++v) sums[r][v] = add ? load(c + r * c_stride + v * kLanes) : Vector{};
  }
  for (int64_t k = 0; k < depth; ++k) {
    Vector line[Vectors];
    for (int v = 0; v < Vectors; ++v) line[v] = load(b + k * b_stride + v * kLanes);
    for (int r = 0; r < Rows; ++r) {
      const Vector factor = broadcast(a[r * a_stride + k]);
      for (int v = 0; v < Vectors; ++v) sums[r][v] += factor * line[v];
    }
  }
  for (int r = 0; r < Rows; ++r) {
    for (int v = 0; v < Vectors; ++v) store(c + r * c_stride + v * kLanes, sums[r][v]);
  }
}

template <int Vectors>
void product_columns(bool add, const float* a, int64_t a_stride, int64_t rows, const float* b, int64_t b_stride, int64_t depth, float* c,
                     int64_t c_stride) {
  int64_t r = 0;
  const auto run = [&](auto step, int64_t count) {
    for (; r + count <= rows; r += count) step(add, a + r * a_stride, a_stride, b, b_stride, depth, c + r * c_stride, c_stride);
  };
  run(product_tile<kMostRows, Vectors>, kMostRows);
  if constexpr (kMostRows > 8) run(product_tile<8, Vectors>, 8);
  run(product_tile<4, Vectors>, 4);
  run(product_tile<3, Vectors>, 3);
  run(product_tile<2, Vectors>, 2);
  run(product_tile<1, Vectors>, 1);
}

void product(bool add, const float* a, int64_t a_stride, int64_t rows, const float* b, int64_t b_stride, int64_t depth, int64_t columns,
             float* c, int64_t c_stride) {
  int64_t j = 0;
  for (; j + 2 * kLanes <= columns; j += 2 * kLanes) product_columns<2>(add, a, a_stride, rows, b + j, b_stride, depth, c + j, c_stride);
  for (; j + kLanes <= columns; j += kLanes) product_columns<1>(add, a, a_stride, rows, b + j, b_stride, depth, c + j, c_stride);
  for (; j < columns; ++j) {
    for (int64_t r = 0; r < rows; ++r) {
      float sum = add ? c[r * c_stride + j] : 0;
      for (int64_t k = 0; k < depth; ++k) sum += a[r * a_stride + k] * b[k * b_stride + j];
      c[r * c_stride + j] = sum;
    }
  }
}

template <class Element, int Count, int Vectors, bool Copies>
void mean_tile(const float* weights, int64_t stride, const Element* values, int64_t value_stride, int64_t tokens, int64_t size,
               float* total, Element* copy) {
  Vector sums[Count][Vectors];
  for (int r = 0; r < Count; ++r) {
    for (int v = 0; v < Vectors; ++v) sums[r][v] = load(total + r * size + v * kLanes);
  }
  for (int64_t t = 0; t < tokens; ++t) {
    for (int v = 0; v < Vectors; ++v) {
      const Element* const from = values + t * value_stride + v * kLanes;
      const Vector value = load(from);
      if constexpr (Copies) copy_lanes(from, copy + t * size + v * kLanes, value);
      for (int r = 0; r < Count; ++r) sums[r][v] += weights[r * stride + t] * value;
    }
  }
  for (int r = 0; r < Count; ++r) {
    for (int v = 0; v < Vectors; ++v) store(total + r * size + v * kLanes, sums[r][v]);
  }
}

template <class Element, int Count, bool Copies>
void mean_rows(const float* weights, int64_t stride, const Element* values, int64_t value_stride, int64_t tokens, int64_t size,
               float* total, Element* copy) {
  constexpr int kMost = kLanes == 16 ? 4 : 2;
  int64_t i = 0;
  const auto run = [&](auto step, int64_t count) {
    for (; i + count <= size; i += count) step(weights, stride, values + i, value_stride, tokens, size, total + i, Copies ? copy + i : copy);
  };
  run(mean_tile<Element, Count, kMost, Copies>, kMost * kLanes);
  run(mean_tile<Element, Count, 1, Copies>, kLanes);
  for (int64_t t = 0; i < size && t < tokens; ++t) {
    for (int64_t j = i; j < size; ++j) {
      const float value = load_one(values + t * value_stride + j);
      if constexpr (Copies) copy[t * size + j] = values[t * value_stride + j];
      for (int r = 0; r < Count; ++r) total[r * size + j] += weights[r * stride + t] * value;
    }
  }
}

template <class Element>
void mean(const float* weights, int64_t stride, int64_t rows, const Element* values, int64_t value_stride, int64_t tokens, int64_t size,
          float* total, Element* copy) {
  int64_t r = 0;
  const auto run = [&](auto plain, auto copies, int64_t count) {
    for (; r + count <= rows; r += count) {
      (copy && r == 0 ? copies : plain)(weights + r * stride, stride, values, value_stride, tokens, size, total + r * size, copy);
    }
  };
  run(mean_rows<Element, 4, false>, mean_rows<Element, 4, true>, 4);
  run(mean_rows<Element, 3, false>, mean_rows<Element, 3, true>, 3);
  run(mean_rows<Element, 2, false>, mean_rows<Element, 2, true>, 2);
  run(mean_rows<Element, 1, false>, mean_rows<Element, 1, true>, 1);
}

constexpr float kMinusInfinity = -__builtin_inff();

inline int64_t panel_end(int64_t tokens) { return (tokens + kPanel - 1) / kPanel * kPanel; }

inline float largest_lane(Vector numbers) {
  float largest = kMinusInfinity;
  for (int64_t i = 0; i < kLanes; ++i) largest = numbers[i] > largest ? numbers[i] : largest;
  return largest;
}

float largest(const float* numbers, int64_t count) {
  const int64_t whole = count / kLanes * kLanes;
  Vector most = broadcast(kMinusInfinity);
  for (int64_t t = 0; t < whole; t += kLanes) {
    const Vector some = load(numbers + t);
    most = some > most ? some : most;
  }
  float found = largest_lane(most);
  for (int64_t t = whole; t < count; ++t) found = numbers[t] > found ? numbers[t] : found;
  return found;
}

bool reaches(const float* numbers, int64_t count, float least) {
  const int64_t whole = count / kLanes * kLanes;
  const Vector bound = broadcast(least);
  Lanes found = {};
  for (int64_t t = 0; t < whole; t += kLanes) found |= ~(load(numbers + t) < bound);
  bool any = false;
  for (int64_t i = 0; i < kLanes; ++i) any |= found[i] != 0;
  for (int64_t t = whole; t < count; ++t) any |= !(numbers[t] < least);
  return any;
}

float add_mask(float* scores, int64_t tokens, float scale, const float* mask) {
  const int64_t whole = tokens / kLanes * kLanes;
  Vector most = broadcast(kMinusInfinity);
  for (int64_t t = 0; t < whole; t += kLanes) {
    Vector score = load(scores + t) * scale;
    if (mask) score += load(mask + t);
    most = score > most ? score : most;
    store(scores + t, score);
  }
  float found = largest_lane(most);
  for (int64_t t = whole; t < tokens; ++t) {
    scores[t] = scores[t] * scale + (mask ? mask[t] : 0.0f);
    found = scores[t] > found ? scores[t] : found;
  }
  for (int64_t t = tokens; t < panel_end(tokens); ++t) scores[t] = kMinusInfinity;
  return found;
}

// e^x within 2 ulp, 0 below -87, for x that is not above 0 or NaN, which stays.
inline Vector exponential(Vector x) {
  const Vector low = broadcast(-87.0f);
  const Vector bounded = x > low ? x : low;
  // To the nearest integer by the rounding of an addition whose sum has no bits below one.
  constexpr float kShifter = 12582912.0f;  // 1.5 * 2^23
  const Vector shifted = bounded * 1.44269504f + kShifter;
  const Vector n = shifted - kShifter;
  const Vector r = bounded - n * 0.693359375f - n * -2.12194440e-4f;  // ln 2 in two parts, the first of few bits
  // The polynomial of Cephes' expf.
  Vector p = broadcast(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  Lanes bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits - 0x4b400000 + 127) << 23;  // 2^n
  Vector power;
  std::memcpy(&power, &bits, sizeof power);
  const Vector result = x >= low ? p * power : Vector{};
  return x == x ? result : x;
}

float exponentials(float* scores, int64_t tokens, float largest) {
  Vector sums = {};
  for (int64_t t = 0; t < panel_end(tokens); t += kLanes) {
    const Vector weight = exponential(load(scores + t) - largest);
    store(scores + t, weight);
    sums += weight;
  }
  float sum = 0;
  for (int64_t i = 0; i < kLanes; ++i) sum += sums[i];
  return sum;
}

void widen(const uint16_t* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(to + i, load(from + i));
  for (; i < count; ++i) to[i] = load_one(from + i);
}

void narrow(const float* from, int64_t count, uint16_t* to) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(to + i, load(from + i));
  for (; i < count; ++i) store_one(to + i, from[i]);
}

template <class Element>
constexpr CacheLoops<Element> kCacheLoops = {scores<Element>, mean<Element>};

constexpr Loops kLoops = {kPanel, kCacheLoops<float>, kCacheLoops<uint16_t>, widen,   narrow,  turn,
                          product, add_mask,           largest,               reaches, exponentials};

}  // namespace
}  // namespace claq::attention
