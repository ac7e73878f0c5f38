#include "epilogue.h"

#include <algorithm>
#include <cstring>

#include "launch.h"

namespace claq::cuda {
namespace {

constexpr int64_t kMostAtOnce = int64_t{1} << 30;  // elements: the kernel counts them in 32 bits

const Kernel* load(const char* name, const Tensors& tensors) { return &Kernels::current().get(name + ("_" + tensors.type)); }

}  // namespace

Add::Add(const Tensors& tensors) : kernel_(load("add", tensors)), item_(static_cast<int64_t>(size_of(tensors.dtype))) {}

void Add::run(const void* residual, void* y, int64_t count, Stream stream) const {
  for (int64_t first = 0; first < count; first += kMostAtOnce) {
    const int64_t elements = std::min(kMostAtOnce, count - first);
    Launch(*kernel_, stream)
        .pointer(static_cast<char*>(y) + first * item_)
        .pointer(static_cast<const char*>(residual) + first * item_)
        .integer(elements)
        .over(divide_up(elements, kernel_->record->tile[0]));
  }
}

AddNorm::AddNorm(const Tensors& tensors, float epsilon) : kernel_(load("addnorm", tensors)) {
  std::memcpy(&epsilon_bits_, &epsilon, sizeof epsilon_bits_);
}

void AddNorm::run(const void* residual, const void* weight, void* y, void* normalized, int64_t rows, int64_t width,
                  Stream stream) const {
  if (rows <= 0) return;
  Launch(*kernel_, stream)
      .pointer(y)
      .pointer(residual)
      .pointer(weight)
      .pointer(normalized)
      .integer(width)
      .integer(epsilon_bits_)
      .over(rows);
}

SwiGlu::SwiGlu(const Tensors& tensors) : kernel_(load("swiglu", tensors)) {}

void SwiGlu::run(const void* product, int64_t rows, int64_t half, void* y, Stream stream) const {
  if (rows <= 0) return;
  Launch(*kernel_, stream).pointer(product).pointer(y).integer(half).over(rows, divide_up(half, kernel_->record->tile[0]));
}

Take::Take(const Tensors& tensors) : kernel_(load("take", tensors)) {}

void Take::run(const void* product, int64_t rows, int64_t width, int64_t first, int64_t columns, void* y, Stream stream) const {
  if (rows <= 0 || columns <= 0) return;
  Launch(*kernel_, stream)
      .pointer(product)
      .pointer(y)
      .integer(width)
      .integer(first)
      .integer(columns)
      .over(rows, divide_up(columns, kernel_->record->tile[0]));
}

Turn::Turn(const Tensors& tensors) : kernel_(load("turn", tensors)) {}

void Turn::run(const void* product, int64_t rows, int64_t width, int64_t first, int64_t columns, const void* cos, const void* sin,
               int64_t head, int64_t half, void* y, Stream stream) const {
  if (rows <= 0 || columns <= 0) return;
  Launch(*kernel_, stream)
      .pointer(product)
      .pointer(cos)
      .pointer(sin)
      .pointer(y)
      .integer(width)
      .integer(first)
      .integer(columns)
      .integer(head)
      .integer(half)
      .over(rows, divide_up(columns, kernel_->record->tile[0]));
}

}  // namespace claq::cuda
