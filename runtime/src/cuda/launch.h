// One launch of a kernel: its parameters in order, checked against what the package says of them.
#pragma once

#include <cstdint>
#include <string>

#include "../layer.h"
#include "driver.h"
#include "package.h"

namespace claq::cuda {

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr uintptr_t kPointerAlignment = 16;  // what the kernels are compiled for, unless their source says otherwise

inline bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % kPointerAlignment == 0; }

constexpr int64_t kMostTiles = 65535;  // of a grid in its second and third dimension
// Of rows in one launch; more take several. A multiple of eight, so that slices of 16-bit numbers begin at 16 bytes for any tile.
constexpr int64_t kMostTilesOfRows = kMostTiles / 8 * 8;

class Launch {
 public:
  Launch(const Kernel& kernel, Stream stream) : kernel_(kernel), stream_(stream) {}

  Launch& pointer(const void* value) {
    values_[count_++].pointer = value;
    letters_ += 'p';
    return *this;
  }
  Launch& integer(int64_t value) {
    if (value < INT32_MIN || value > INT32_MAX) throw InvalidArgument("x: too large for the GPU kernels' 32-bit indices");
    values_[count_++].integer = static_cast<int32_t>(value);
    letters_ += 'i';
    return *this;
  }
  void over(int64_t x, int64_t y = 1, int64_t z = 1) {
    if (letters_ != kernel_.record->parameters) {
      throw Error(kernel_.record->name + " takes " + kernel_.record->parameters + ", this library passes " + letters_);
    }
    if (x > INT32_MAX || y > kMostTiles || z > kMostTiles) throw InvalidArgument("x: has too many rows for one launch on the GPU");
    values_[count_++].pointer = nullptr;  // Triton's two scratch pointers
    values_[count_++].pointer = nullptr;
    void* parameters[kMost];
    for (size_t i = 0; i < count_; ++i) parameters[i] = &values_[i];
    const unsigned grid[3] = {static_cast<unsigned>(x), static_cast<unsigned>(y), static_cast<unsigned>(z)};
    Driver::get().launch(kernel_.function, grid, kernel_.record->threads, kernel_.record->shared, stream_, parameters);
  }

 private:
  static constexpr size_t kMost = 34;  // a record has room for 31 letters
  union Value {
    const void* pointer;
    int32_t integer;
  };
  const Kernel& kernel_;
  Stream stream_;
  Value values_[kMost];
  size_t count_ = 0;
  std::string letters_;
};

}  // namespace claq::cuda
