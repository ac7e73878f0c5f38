// Sorts a column of floats by a stable radix sort, in a time that does not depend on its values.
#pragma once

#include <cstdint>
#include <vector>

namespace claq::quantize {

// Scratch memory for columns of up to `most_values` values; one object serves one thread.
class ColumnSort {
 public:
  // `with_rows`: also finds where each value came from. Throws std::bad_alloc.
  ColumnSort(int64_t most_values, bool with_rows);

  // Fills `ordered` with the ascending values, -0 as 0, and with_rows() with their rows, equal values by rising row. NaNs go
  // beyond the infinities.
  void sort(const float* values, int64_t count, float* ordered);

  const int32_t* rows() const { return rows_.data(); }

 private:
  template <class Element>
  void sort_as(const float* values, int64_t count, float* ordered, std::vector<Element>& from, std::vector<Element>& to);

  bool with_rows_;
  std::vector<uint32_t> keys_, other_keys_;
  std::vector<uint64_t> pairs_, other_pairs_;
  std::vector<int32_t> rows_;
  std::vector<uint32_t> counters_;
};

}  // namespace claq::quantize
