// The part of claq_check.cpp about quantization: random columns with every option on every kernel family and on several
// threads give the same bits, and bad arguments are refused.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "claq.h"

// Exactly as much memory as claq.h says, on the heap, so that an access past an end is seen.
struct TestColumns {
  int64_t columns, rows;
  std::vector<int32_t> width;
  std::vector<int64_t> reserve;
  std::vector<double> row_weight, start;
  std::vector<float> feedback, target, value, error;
  std::vector<uint8_t> codes;
  std::vector<int8_t> codebook;
  std::vector<uint16_t> scale, outlier_extra;
  std::vector<int64_t> outliers;
  std::vector<int32_t> outlier_row;
  claq_columns_desc desc{};
  claq_status status = CLAQ_OK;
  char message[256] = "";

  void run(const char* kernel, int threads) {
    const auto size = static_cast<size_t>(columns * rows);
    size_t room = 0;
    for (const int64_t count : reserve) room += static_cast<size_t>(count > 0 ? count : 0);
    value.assign(size, 0);
    error.assign(feedback.empty() ? 0 : size, 0);
    codes.assign(size, 0);
    codebook.assign(static_cast<size_t>(columns) * 16, 0);
    scale.assign(static_cast<size_t>(columns), 0);
    outliers.assign(static_cast<size_t>(columns), 0);
    outlier_row.assign(room, 0);
    outlier_extra.assign(room, 0);
    desc.struct_size = sizeof desc;
    desc.columns = columns;
    desc.rows = rows;
    desc.width = width.data();
    desc.reserve = reserve.data();
    desc.row_weight = row_weight.empty() ? nullptr : row_weight.data();
    desc.start = start.empty() ? nullptr : start.data();
    desc.feedback = feedback.empty() ? nullptr : feedback.data();
    desc.kernel = kernel;
    desc.target = target.data();
    desc.value = value.data();
    desc.error = error.data();
    desc.codes = codes.data();
    desc.codebook = codebook.data();
    desc.scale = scale.data();
    desc.outliers = outliers.data();
    desc.outlier_row = outlier_row.data();
    desc.outlier_extra = outlier_extra.data();
    status = claq_quantize_columns(&desc, threads > 1 ? claq_pool_parallel_for : nullptr,
                                   reinterpret_cast<void*>(static_cast<uintptr_t>(threads)), message, sizeof message);
  }

  bool same(const TestColumns& other) const {
    // By their bytes: zeros of either sign and special values included.
    const auto equal = [](const auto& a, const auto& b) {
      return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof a[0]) == 0);
    };
    return equal(target, other.target) && equal(value, other.value) && equal(error, other.error) && equal(codes, other.codes) &&
           equal(codebook, other.codebook) && equal(scale, other.scale) && equal(outliers, other.outliers) &&
           equal(outlier_row, other.outlier_row) && equal(outlier_extra, other.outlier_extra);
  }
};

inline TestColumns random_columns(std::mt19937& random) {
  const auto below = [&](int64_t limit) { return static_cast<int64_t>(random() % static_cast<uint64_t>(limit)); };
  TestColumns test;
  test.columns = 1 + below(20);
  test.rows = 1 + below(below(2) ? 40 : 2000);
  const int64_t kinds = 1 + below(6);
  std::normal_distribution<float> normal;
  for (int64_t c = 0; c < test.columns; ++c) {
    const int64_t kind = below(kinds);
    test.width.push_back(static_cast<int32_t>(2 + below(3)));
    test.reserve.push_back(below(2) ? 0 : below(test.rows));
    const float constant = normal(random);
    for (int64_t n = 0; n < test.rows; ++n) {
      const float value = normal(random);
      test.target.push_back(kind == 0   ? value
                            : kind == 1 ? std::round(value * 4) / 4
                            : kind == 2 ? constant
                            : kind == 3 ? 0.0f
                            : kind == 4 ? value * 1e-7f
                                        : value * value * value * 1e3f);
    }
  }
  if (below(2)) {
    for (int64_t n = 0; n < test.rows; ++n) test.row_weight.push_back(below(3) ? static_cast<double>(below(1000)) / 7 : 0.0);
  }
  if (below(4) == 0) {
    for (int64_t c = 0; c < test.columns; ++c) {
      for (int e = 0; e < 16; ++e) test.start.push_back(e * 0.25 - 2);
    }
  }
  if (below(3)) {
    for (int64_t i = 0; i < test.columns; ++i) {
      for (int64_t j = 0; j < test.columns; ++j) test.feedback.push_back(i == j ? 1.5f : normal(random) * 0.1f);
    }
  }
  test.desc.method = static_cast<int32_t>(below(3));
  test.desc.most_iterations = static_cast<int32_t>(1 + below(100));
  test.desc.both_sides = static_cast<int32_t>(below(2));
  test.desc.fit_outliers = static_cast<int32_t>(below(2));
  return test;
}

template <class Expect>
void check_quantization(std::mt19937& random, const std::vector<std::string>& kernels, Expect expect) {
  const TestColumns made = random_columns(random);
  TestColumns portable = made;
  portable.run("portable", 1);
  expect(portable.status == CLAQ_OK, portable.message);
  for (const std::string& kernel : kernels) {
    for (const int threads : {1, 3}) {
      TestColumns other = made;
      other.run(kernel.c_str(), threads);
      expect(other.status == CLAQ_OK && other.same(portable), "quantization differs: " + kernel);
    }
  }
  // The same columns as a profile.
  const int32_t widths[] = {4, 2};
  const int64_t reserves[] = {0, made.rows / 3};
  std::vector<double> first(static_cast<size_t>(made.columns) * 4), second(first.size());
  claq_profile_desc desc{sizeof desc, made.columns, made.rows, made.target.data(), widths, 2, reserves, 2, 12, nullptr, first.data()};
  char message[256] = "";
  expect(claq_profile_columns(&desc, nullptr, nullptr, message, sizeof message) == CLAQ_OK, message);
  desc.error = second.data();
  desc.kernel = "portable";
  expect(claq_profile_columns(&desc, claq_pool_parallel_for, reinterpret_cast<void*>(uintptr_t{3}), message, sizeof message) == CLAQ_OK,
         message);
  expect(first == second, "profiles differ");
}

template <class Expect>
void check_bad_columns(std::mt19937& random, Expect expect) {
  TestColumns good;
  do good = random_columns(random);
  while (good.columns < 2 || good.rows < 3);
  const auto refused = [&](const char* name, auto change) {
    TestColumns bad = good;
    change(bad);
    bad.run(nullptr, 1);
    expect(bad.status == CLAQ_INVALID_ARGUMENT && std::strncmp(bad.message, name, std::strlen(name)) == 0,
           std::string(name) + " expected in: " + bad.message);
  };
  refused("target", [](TestColumns& t) { t.target[1] = std::numeric_limits<float>::quiet_NaN(); });
  refused("target", [](TestColumns& t) { t.target[1] = -std::numeric_limits<float>::infinity(); });
  refused("width", [](TestColumns& t) { t.width[1] = 5; });
  refused("reserve", [](TestColumns& t) { t.reserve[0] = t.rows; });
  refused("reserve", [](TestColumns& t) { t.reserve[1] = -1; });
  refused("row_weight", [](TestColumns& t) { t.row_weight.assign(static_cast<size_t>(t.rows), -1.0); });
  refused("start", [](TestColumns& t) { t.start.assign(static_cast<size_t>(t.columns) * 16, std::nan("")); });
  refused("method", [](TestColumns& t) { t.desc.method = 3; });
  refused("most_iterations", [](TestColumns& t) { t.desc.most_iterations = 0; });
  char message[256] = "";
  expect(claq_quantize_columns(nullptr, nullptr, nullptr, message, sizeof message) == CLAQ_INVALID_ARGUMENT, "accepted no descriptor");
}
