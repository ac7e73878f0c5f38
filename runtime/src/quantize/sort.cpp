#include "sort.h"

#include <algorithm>
#include <utility>

#include "../half.h"

namespace claq::quantize {
namespace {

// Below this, clearing and summing up the counters of wide digits takes longer than a further pass of narrow ones.
constexpr int64_t kWideFrom = 1500;

// Keys ascend as the floats do.
inline uint32_t key_of(float value) {
  const uint32_t bits = float_to_bits(value + 0.0f);
  return bits ^ ((bits >> 31) ? 0xffffffffu : 0x80000000u);
}

inline float value_of(uint32_t key) { return bits_to_float(key ^ ((key >> 31) ? 0x80000000u : 0xffffffffu)); }

inline uint32_t key_part(uint32_t element) { return element; }
inline uint32_t key_part(uint64_t element) { return static_cast<uint32_t>(element >> 32); }

}  // namespace

ColumnSort::ColumnSort(int64_t most_values, bool with_rows) : with_rows_(with_rows), counters_(3 * 2048) {
  const auto size = static_cast<size_t>(most_values);
  if (with_rows) {
    pairs_.resize(size);
    other_pairs_.resize(size);
    rows_.resize(size);
  } else {
    keys_.resize(size);
    other_keys_.resize(size);
  }
}

template <class Element>
void ColumnSort::sort_as(const float* values, int64_t count, float* ordered, std::vector<Element>& from, std::vector<Element>& to) {
  const int digit = count < kWideFrom ? 8 : 11, passes = (32 + digit - 1) / digit;
  const uint32_t buckets = 1u << digit, mask = buckets - 1;
  uint32_t* counters = counters_.data();
  std::fill(counters, counters + static_cast<size_t>(passes) * buckets, 0u);
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t key = key_of(values[i]);
    from[static_cast<size_t>(i)] = sizeof(Element) == 8 ? static_cast<Element>(uint64_t{key} << 32 | static_cast<uint32_t>(i)) : static_cast<Element>(key);
    for (int pass = 0; pass < passes; ++pass) ++counters[static_cast<uint32_t>(pass) * buckets + (key >> (digit * pass) & mask)];
  }
  Element* source = from.data();
  Element* target = to.data();
  for (int pass = 0; pass < passes; ++pass) {
    uint32_t* places = counters + static_cast<uint32_t>(pass) * buckets;
    const int shift = digit * pass;
    if (places[key_part(source[0]) >> shift & mask] == static_cast<uint32_t>(count)) continue;  // all digits are equal
    uint32_t sum = 0;
    for (uint32_t b = 0; b < buckets; ++b) sum += std::exchange(places[b], sum);
    for (int64_t i = 0; i < count; ++i) target[places[key_part(source[i]) >> shift & mask]++] = source[i];
    std::swap(source, target);
  }
  for (int64_t i = 0; i < count; ++i) ordered[i] = value_of(key_part(source[i]));
  if (sizeof(Element) == 8) {
    for (int64_t i = 0; i < count; ++i) rows_[static_cast<size_t>(i)] = static_cast<int32_t>(static_cast<uint32_t>(source[i]));
  }
}

void ColumnSort::sort(const float* values, int64_t count, float* ordered) {
  if (with_rows_) {
    sort_as(values, count, ordered, pairs_, other_pairs_);
  } else {
    sort_as(values, count, ordered, keys_, other_keys_);
  }
}

}  // namespace claq::quantize
