// The bodies of loops.h in plain C++, for the compiler to vectorise; CLAQ_LANES is how many floats a vector holds. Free of
// C++ library code, so that no instance of a shared inline function compiled here is called on a CPU without the instructions.
#pragma once

#include <cstdint>
#include <cstring>

#include "../vectors.h"
#include "loops.h"

namespace claq::quantize {
namespace {

// One load of an error serves `Count` columns, whose sums stay in registers.
template <int Count>
void feed_back_columns(float* columns, const float* factors, int64_t stride, const float* errors, int64_t first, int64_t last,
                       int64_t rows, int64_t begin, int64_t end) {
  int64_t n = begin;
  for (; n + 2 * CLAQ_LANES <= end; n += 2 * CLAQ_LANES) {
    Vector sums[Count][2];
    for (int c = 0; c < Count; ++c) {
      sums[c][0] = load(columns + c * rows + n);
      sums[c][1] = load(columns + c * rows + n + CLAQ_LANES);
    }
    for (int64_t j = first; j < last; ++j) {
      const Vector left = load(errors + j * rows + n), right = load(errors + j * rows + n + CLAQ_LANES);
      for (int c = 0; c < Count; ++c) {
        const float factor = factors[c * stride + j];
        sums[c][0] -= factor * left;
        sums[c][1] -= factor * right;
      }
    }
    for (int c = 0; c < Count; ++c) {
      store(columns + c * rows + n, sums[c][0]);
      store(columns + c * rows + n + CLAQ_LANES, sums[c][1]);
    }
  }
  for (; n < end; ++n) {
    for (int c = 0; c < Count; ++c) {
      float sum = columns[c * rows + n];
      for (int64_t j = first; j < last; ++j) sum -= factors[c * stride + j] * errors[j * rows + n];
      columns[c * rows + n] = sum;
    }
  }
}

void feed_back(float* columns, int64_t count, const float* factors, int64_t stride, const float* errors, int64_t first,
               int64_t last, int64_t rows, int64_t begin, int64_t end) {
  // Stripes that stay in the first-level cache with the errors of a few rows at a time.
  constexpr int64_t kStripe = 1024;
  for (int64_t n = begin; n < end; n += kStripe) {
    const int64_t stop = n + kStripe < end ? n + kStripe : end;
    int64_t c = 0;
    for (; c + 4 <= count; c += 4) {
      feed_back_columns<4>(columns + c * rows, factors + c * stride, stride, errors, first, last, rows, n, stop);
    }
    for (; c < count; ++c) {
      feed_back_columns<1>(columns + c * rows, factors + c * stride, stride, errors, first, last, rows, n, stop);
    }
  }
}

void assign(const float* column, int64_t count, const float* table, int entries, uint8_t* codes, float* value) {
  constexpr int64_t kTile = 256;
  float middle[15];
  for (int e = 0; e + 1 < entries; ++e) middle[e] = (table[e + 1] + table[e]) * 0.5f;
  int32_t code[kTile];
  for (int64_t start = 0; start < count; start += kTile) {
    const int64_t length = count - start < kTile ? count - start : kTile;
    const float* from = column + start;
    float* to = value + start;
    for (int64_t n = 0; n < length; ++n) {
      code[n] = 0;
      to[n] = table[0];
    }
    // Borders ascend, so the last one that a value exceeds decides.
    for (int e = 0; e + 1 < entries; ++e) {
      const float border = middle[e], entry = table[e + 1];
      for (int64_t n = 0; n < length; ++n) {
        const bool above = border < from[n];
        code[n] = above ? e + 1 : code[n];
        to[n] = above ? entry : to[n];
      }
    }
    for (int64_t n = 0; n < length; ++n) codes[start + n] = static_cast<uint8_t>(code[n]);
  }
}

void divide_error(const float* column, const float* value, float divisor, float* error, int64_t count) {
  for (int64_t n = 0; n < count; ++n) error[n] = (column[n] - value[n]) / divisor;
}

void compand(double* gaps, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const double half = __builtin_sqrt(gaps[i]);
    const double eighth = __builtin_sqrt(__builtin_sqrt(half));
    gaps[i] = half * eighth * __builtin_sqrt(__builtin_sqrt(eighth));
  }
}

void coarse_gain(const double* moment, const double* mass, int64_t count, int64_t stride, double* gain) {
  for (int64_t i = 0; i < count; ++i) {
    double* row = gain + i * stride;
    for (int64_t j = 0; j < stride; ++j) row[j] = -__builtin_inf();
    for (int64_t j = i + 1; j < count; ++j) {
      const double sum = moment[j] - moment[i], inside = mass[j] - mass[i];
      row[j] = inside > 0 ? sum * sum / inside : 0.0;
    }
  }
}

void coarse_layer(const double* gain, const double* before, int64_t count, int64_t stride, double* after) {
  for (int64_t j = 0; j < stride; ++j) after[j] = -__builtin_inf();
  for (int64_t i = 0; i < count; ++i) {
    const double* row = gain + i * stride;
    const double sum = before[i];
    for (int64_t j = i / 8 * 8; j < stride; ++j) {
      const double total = row[j] + sum;
      after[j] = total > after[j] ? total : after[j];
    }
  }
}

void partition_gain(const double* moment, const double* mass, const double* best, int64_t first, int64_t last, int64_t end,
                    double* total) {
  const double whole = moment[end];
  for (int64_t i = first; i < last; ++i) {
    const double sum = whole - moment[i];
    const double inside = mass ? mass[end] - mass[i] : static_cast<double>(end - i);
    total[i] = best[i] + (inside > 0 ? sum * sum / inside : 0.0);
  }
}

constexpr Loops kLoops = {feed_back, assign, divide_error, compand, coarse_gain, coarse_layer, partition_gain};

}  // namespace
}  // namespace claq::quantize
