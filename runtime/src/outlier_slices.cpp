#include "outlier_slices.h"

#include <algorithm>
#include <array>
#include <numeric>
#include <utility>

#include "pages.h"
#include "round_up.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace claq {
namespace {

// Entries that a slice may be padded to: a row that is kept whole among others that have few must not cost sixteen.
int64_t most_padded(int64_t entries) { return entries + entries / 2 + 8 * kSliceOutputs; }

using Order = std::array<uint8_t, kNarrowestTile>;

// The outputs of a tile: most entries first, then in order. Digit by digit of the numbers of entries, the lowest first.
Order most_entries_first(const int32_t* entries) {
  constexpr int kDigitBits = 8;
  Order order;
  std::iota(order.begin(), order.end(), uint8_t{0});
  const int64_t most = *std::max_element(entries, entries + kNarrowestTile);
  for (int shift = 0; most >> shift; shift += kDigitBits) {
    const auto digit = [&](uint8_t output) { return static_cast<uint8_t>(entries[output] >> shift); };
    std::array<uint8_t, 1 << kDigitBits> place{};  // first how many outputs have a digit, then where the next of them goes
    for (const uint8_t output : order) ++place[digit(output)];
    uint8_t next = 0;
    for (size_t d = place.size(); d-- > 0;) next = static_cast<uint8_t>(next + std::exchange(place[d], next));
    const Order before = order;
    for (const uint8_t output : before) order[place[digit(output)]++] = output;
  }
  return order;
}

// Copies the first entries of sixteen outputs, `least` of which all have, so that entries j lie side by side. Returns how many of each: whole vectors.
template <class Element>
int64_t copy_vectors(const Element* const*, int64_t, Element*) {
  return 0;
}

#if defined(__SSE2__)
template <>
int64_t copy_vectors(const uint16_t* const* from, int64_t least, uint16_t* to) {
  constexpr int64_t kLength = 8;
  const int64_t copied = least / kLength * kLength;
  for (int64_t j = 0; j < copied; j += kLength) {
    for (int64_t s = 0; s < kSliceOutputs; s += kLength) {
      const auto row = [&](int64_t i) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from[s + i] + j)); };
      __m128i pairs[8], fours[8];  // of entries j, j + 1, ... of two outputs, then of four
      for (int i = 0; i < 4; ++i) {
        pairs[2 * i] = _mm_unpacklo_epi16(row(2 * i), row(2 * i + 1));
        pairs[2 * i + 1] = _mm_unpackhi_epi16(row(2 * i), row(2 * i + 1));
      }
      for (int i = 0; i < 8; i += 4) {
        for (int half = 0; half < 2; ++half) {
          fours[i + 2 * half] = _mm_unpacklo_epi32(pairs[i + half], pairs[i + half + 2]);
          fours[i + 2 * half + 1] = _mm_unpackhi_epi32(pairs[i + half], pairs[i + half + 2]);
        }
      }
      for (int i = 0; i < 4; ++i) {
        uint16_t* entries = to + kSliceOutputs * (j + 2 * i) + s;
        _mm_storeu_si128(reinterpret_cast<__m128i*>(entries), _mm_unpacklo_epi64(fours[i], fours[i + 4]));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(entries + kSliceOutputs), _mm_unpackhi_epi64(fours[i], fours[i + 4]));
      }
    }
  }
  return copied;
}
#endif

// Entry j of output s of a slice goes to to[kSliceOutputs * j + s]: the first count[s] of `from[s]`, then zeros. The last output has the fewest.
template <class Element>
void copy_slice(const Element* const (&from)[kSliceOutputs], const int32_t* count, int64_t steps, Element* to) {
  const int64_t copied = copy_vectors(from, count[kSliceOutputs - 1], to);
  for (int64_t s = 0; s < kSliceOutputs; ++s) {
    for (int64_t j = copied; j < steps; ++j) to[kSliceOutputs * j + s] = j < count[s] ? from[s][j] : Element{0};
  }
}

template <class Element>
std::unique_ptr<Element[]> new_pages(int64_t count) {
  std::unique_ptr<Element[]> elements(new Element[static_cast<size_t>(count)]);
  populate_pages(elements.get(), static_cast<size_t>(count) * sizeof(Element));
  return elements;
}

}  // namespace

const OutlierSlices* SlicedOutliers::make(const LayerView& layer) {
  arrange(layer);
  value_ = new_pages<uint16_t>(length_);
  if (layer.wide_outlier_index) copy(layer, wide_index_);
  else copy(layer, narrow_index_);
  const void* index = layer.wide_outlier_index ? static_cast<const void*>(wide_index_.get()) : narrow_index_.get();
  view_ = {slices_.data(), count_.data(), output_.data(), slot_.data(), index, value_.get()};
  return &view_;
}

void SlicedOutliers::arrange(const LayerView& layer) {
  const int64_t slots = round_up(layer.out_features, kNarrowestTile);
  count_.resize(static_cast<size_t>(slots));
  output_.resize(count_.size());
  slot_.resize(count_.size());
  for (int64_t first = 0; first < slots; first += kNarrowestTile) {
    std::array<int32_t, kNarrowestTile> entries{};
    const int64_t outputs = std::min<int64_t>(kNarrowestTile, layer.out_features - first);
    for (int64_t i = 0; i < outputs; ++i) entries[static_cast<size_t>(i)] = layer.outlier_ptr[first + i + 1] - layer.outlier_ptr[first + i];
    const Order order = most_entries_first(entries.data());
    for (size_t i = 0; i < order.size(); ++i) {
      const size_t place = static_cast<size_t>(first) + i;
      output_[place] = order[i];
      count_[place] = entries[order[i]];
      slot_[static_cast<size_t>(first) + order[i]] = static_cast<uint8_t>(i);
    }
  }
  for (int64_t first = 0; first < slots; first += kSliceOutputs) {
    const int32_t* counts = count_.data() + first;
    int64_t entries = 0;
    for (int s = 0; s < kSliceOutputs; ++s) entries += counts[s];
    const int64_t padded = int64_t{kSliceOutputs} * counts[0];
    const bool regular = padded <= most_padded(entries);
    slices_.push_back({length_, regular ? counts[0] : kAsRows});
    if (regular) length_ += padded;
  }
}

template <class Index>
void SlicedOutliers::copy(const LayerView& layer, std::unique_ptr<Index[]>& index) {
  index = new_pages<Index>(length_);
  for (size_t slice = 0; slice < slices_.size(); ++slice) {
    const int64_t steps = slices_[slice].steps;
    if (steps == kAsRows) continue;
    const auto tile = static_cast<int64_t>(slice) * kSliceOutputs / kNarrowestTile * kNarrowestTile;
    const int32_t* count = count_.data() + slice * kSliceOutputs;
    const uint8_t* output = output_.data() + slice * kSliceOutputs;
    const Index* from_index[kSliceOutputs];
    const uint16_t* from_value[kSliceOutputs];
    for (int64_t s = 0; s < kSliceOutputs; ++s) {
      const int64_t entry = count[s] ? layer.outlier_ptr[tile + output[s]] : 0;
      from_index[s] = static_cast<const Index*>(layer.outlier_index) + entry;
      from_value[s] = layer.outlier_value + entry;
    }
    copy_slice(from_index, count, steps, index.get() + slices_[slice].first);
    copy_slice(from_value, count, steps, value_.get() + slices_[slice].first);
  }
}

}  // namespace claq
