#include "epilogue.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "dtype.h"
#include "elements.h"
#include "family.h"
#include "run.h"
#include "workspace.h"

namespace claq {
namespace {

constexpr int64_t kMostProductRows = 256;     // of a product on its way into other arrays; `run` takes no more at a time either
constexpr double kElementsPerSecond = 1e9;  // a rounded estimate, only used to decide into how many tasks to split

// Runs body(first, last) over [0, rows), which hold `elements` elements.
template <class Body>
void for_each_stripe(const Host& host, int64_t rows, int64_t elements, Body body) {
  if (rows == 0) return;
  const int64_t tasks = task_count(host, static_cast<double>(elements) / kElementsPerSecond, rows);
  for_each(host, tasks, [&](int64_t task) { body(rows * task / tasks, rows * (task + 1) / tasks); });
}

// Calls use(first, count, product) with rows [first, first + count) of the product.
template <class Use>
void for_each_product(const claq_layer& layer, claq_dtype dtype, int32_t accuracy_level, const void* x, int64_t rows, const Host& host,
                      Use use) {
  const int64_t K = layer.view.in_features, N = layer.view.out_features;
  const auto item = static_cast<int64_t>(size_of(dtype));
  const int64_t most = std::min(rows, kMostProductRows);
  Workspace workspace(static_cast<size_t>(most * N * item));
  char* product = workspace.first<char>();
  for (int64_t first = 0; first < rows; first += most) {
    const int64_t count = std::min(most, rows - first);
    run(layer, dtype, accuracy_level, static_cast<const char*>(x) + first * K * item, count, product, host);
    use(first, count, product);
  }
}

void turn(const float* head, const float* cos, const float* sin, int64_t half, int64_t length, float* y) {
  for (int64_t i = 0; i < half; ++i) {
    y[i] = head[i] * cos[i] - head[half + i] * sin[i];
    y[half + i] = head[half + i] * cos[i] + head[i] * sin[i];
  }
  for (int64_t i = 2 * half; i < length; ++i) y[i] = head[i];
}

void normalize(const float* x, const float* weight, float epsilon, int64_t count, float* y) {
  // In lanes, so that the compiler can vectorize the sum.
  constexpr int kLanes = 16;
  float lanes[kLanes] = {};
  const int64_t whole = count / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) {
    for (int j = 0; j < kLanes; ++j) lanes[j] += x[i + j] * x[i + j];
  }
  for (int64_t i = whole; i < count; ++i) lanes[i - whole] += x[i] * x[i];
  float sum = 0;
  for (const float lane : lanes) sum += lane;
  const float scale = 1.0f / std::sqrt(sum / static_cast<float>(count) + epsilon);
  for (int64_t i = 0; i < count; ++i) y[i] = x[i] * scale * weight[i];
}

}  // namespace

void run_split(const claq_layer& layer, claq_dtype dtype, int32_t accuracy_level, const void* x, int64_t rows,
               const std::array<int64_t, kMostParts>& parts, const Rotary& rotary, const std::array<void*, kMostParts>& y,
               const Host& host) {
  if (!rotary.cos && rows <= kMostProductRows) {
    // Of more rows the parts are too large for a cache, where copies of the product take less time than its scattered lines.
    Part shares[kMostParts];
    for (size_t i = 0; i < kMostParts; ++i) shares[i] = {y[i], parts[i]};
    return run(layer, dtype, accuracy_level, x, rows, shares, kMostParts, host);
  }
  const Family& family = *layer.family;
  const int64_t N = layer.view.out_features, half = rotary.half;
  const auto item = static_cast<int64_t>(size_of(dtype));
  const bool wide = dtype == CLAQ_FLOAT32;
  for_each_product(layer, dtype, accuracy_level, x, rows, host, [&](int64_t first, int64_t count, const char* product) {
    for_each_stripe(host, count, count * N, [&](int64_t m0, int64_t m1) {
      const bool converts = !wide && rotary.cos;
      Workspace workspace(converts ? 2 * Workspace::bytes_for<float>(N) + 2 * Workspace::bytes_for<float>(half) : 0);
      float* row = workspace.take<float>(converts ? N : 0);
      float* turned = workspace.take<float>(converts ? N : 0);
      float* cos_buffer = workspace.take<float>(converts ? half : 0);
      float* sin_buffer = workspace.take<float>(converts ? half : 0);
      for (int64_t m = m0; m < m1; ++m) {
        const float* values = rotary.cos ? load_row(family, dtype, product, m, N, row) : nullptr;
        const float* cos = rotary.cos ? load_row(family, dtype, rotary.cos, first + m, half, cos_buffer) : nullptr;
        const float* sin = rotary.cos ? load_row(family, dtype, rotary.sin, first + m, half, sin_buffer) : nullptr;
        int64_t column = 0;
        for (int i = 0; i < kMostParts; column += parts[i], ++i) {
          const int64_t length = parts[i], offset = (first + m) * length;
          if (length == 0) continue;
          if (!cos || i >= static_cast<int>(rotary.heads.size())) {
            std::memcpy(static_cast<char*>(y[i]) + offset * item, product + (m * N + column) * item, static_cast<size_t>(length * item));
            continue;
          }
          float* to = wide ? static_cast<float*>(y[i]) + offset : turned;
          const int64_t head = length / rotary.heads[static_cast<size_t>(i)];
          for (int64_t h = 0; h < length; h += head) turn(values + column + h, cos, sin, half, head, to + h);
          if (!wide) store_row(family, dtype, to, length, y[i], offset);
        }
      }
    });
  });
}

void run_swiglu(const claq_layer& layer, claq_dtype dtype, int32_t accuracy_level, const void* x, int64_t rows, void* y, const Host& host) {
  const Family& family = *layer.family;
  const int64_t half = layer.view.out_features / 2;
  for_each_product(layer, dtype, accuracy_level, x, rows, host, [&](int64_t first, int64_t count, const char* product) {
    for_each_stripe(host, count, count * half * 4, [&](int64_t m0, int64_t m1) {
      Workspace workspace(dtype == CLAQ_FLOAT32 ? 0 : Workspace::bytes_for<float>(3 * half));
      float* buffer = workspace.take<float>(3 * half);
      for (int64_t m = m0; m < m1; ++m) {
        const float* gate = load_row(family, dtype, product, 2 * m, half, buffer);
        const float* up = load_row(family, dtype, product, 2 * m + 1, half, buffer + half);
        const int64_t offset = (first + m) * half;
        float* result = dtype == CLAQ_FLOAT32 ? static_cast<float*>(y) + offset : buffer + 2 * half;
        family.swiglu(gate, up, result, half);
        if (dtype != CLAQ_FLOAT32) store_row(family, dtype, result, half, y, offset);
      }
    });
  });
}

void run_add(const claq_layer& layer, claq_dtype dtype, int32_t accuracy_level, const void* x, int64_t rows, const void* residual,
             const Norm& norm, void* y, const Host& host) {
  run(layer, dtype, accuracy_level, x, rows, y, host);
  const Family& family = *layer.family;
  const int64_t N = layer.view.out_features;
  const bool wide = dtype == CLAQ_FLOAT32;
  for_each_stripe(host, rows, rows * N * (norm.weight ? 2 : 1), [&](int64_t m0, int64_t m1) {
    Workspace workspace(wide ? 0 : Workspace::bytes_for<float>(N) * 3);
    float* buffer = workspace.take<float>(N);
    float* other = workspace.take<float>(N);
    const float* weight = norm.weight ? load_row(family, dtype, norm.weight, 0, N, workspace.take<float>(N)) : nullptr;
    for (int64_t m = m0; m < m1; ++m) {
      const float* added = load_row(family, dtype, residual, m, N, other);
      float* sum = wide ? static_cast<float*>(y) + m * N : buffer;
      if (!wide) load_row(family, dtype, y, m, N, sum);
      for (int64_t n = 0; n < N; ++n) sum[n] += added[n];
      if (!wide) store_row(family, dtype, sum, N, y, m * N);
      if (!weight) continue;
      if (!wide) load_row(family, dtype, y, m, N, sum);  // what is normalized is the sum as it is rounded
      float* normalized = wide ? static_cast<float*>(norm.normalized) + m * N : other;
      normalize(sum, weight, norm.epsilon, N, normalized);
      if (!wide) store_row(family, dtype, normalized, N, norm.normalized, m * N);
    }
  });
}

}  // namespace claq
