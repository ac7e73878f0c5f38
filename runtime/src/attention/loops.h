// The loops of attention, compiled once for each vector width. Sums are taken in lanes, so results differ in their last bits from
// one width to another.
#pragma once

#include <cstdint>

namespace claq::attention {

// What reads keys and values as they are in memory: float, or the bits of float16.
template <class Element>
struct CacheLoops {
  // scores[r * stride + t] = query[r * size ...] . keys[t * key_stride ...] for t < tokens, rounded up to a vector. Keys are written
  // to `copy` [tokens, size] on the way if it is not null.
  void (*scores)(const float* query, int64_t rows, const Element* keys, int64_t key_stride, int64_t tokens, int64_t size, float* scores,
                 int64_t stride, Element* copy);

  // total[r * size + i] += sum over t < tokens of weights[r * stride + t] * values[t * value_stride + i]; values are written to
  // `copy` [tokens, size] likewise.
  void (*mean)(const float* weights, int64_t stride, int64_t rows, const Element* values, int64_t value_stride, int64_t tokens,
               int64_t size, float* total, Element* copy);
};

struct Loops {
  // Tokens in a panel of turned keys; rows of scores are padded to a multiple of it.
  int64_t panel;

  CacheLoops<float> single;
  CacheLoops<uint16_t> half;

  // Conversions of `count` numbers from and to the bits of float16, to nearest.
  void (*widen)(const uint16_t* from, int64_t count, float* to);
  void (*narrow)(const float* from, int64_t count, uint16_t* to);

  // turned[i * panel + t] = keys[t * key_stride + i] for t < tokens, 0 for the rest of the panel.
  void (*turn)(const float* keys, int64_t key_stride, int64_t tokens, int64_t size, float* turned);

  // c[r * c_stride + j] (+)= sum over k < depth of a[r * a_stride + k] * b[k * b_stride + j] for j < columns.
  void (*product)(bool add, const float* a, int64_t a_stride, int64_t rows, const float* b, int64_t b_stride, int64_t depth,
                  int64_t columns, float* c, int64_t c_stride);

  // scores[t] = scale * scores[t] + mask[t] (null: no mask) for t < tokens, minus infinity beyond, up to the panel's end. Returns the
  // largest.
  float (*add_mask)(float* scores, int64_t tokens, float scale, const float* mask);

  // The largest of `count` numbers, NaNs left out; minus infinity of none.
  float (*largest)(const float* numbers, int64_t count);

  // Whether one of them is not below `least`; a NaN is not.
  bool (*reaches)(const float* numbers, int64_t count, float least);

  // scores[t] = e^(scores[t] - largest) up to the panel's end. Returns the sum.
  float (*exponentials)(float* scores, int64_t tokens, float largest);
};

extern const Loops kPortableLoops;
#if defined(__x86_64__)
extern const Loops kAvx2Loops;
extern const Loops kAvx512Loops;
#endif

}  // namespace claq::attention
