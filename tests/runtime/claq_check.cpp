// Drives the C interface under AddressSanitizer and UndefinedBehaviorSanitizer: random layers of every width mix on every
// kernel family, concurrent runs, and layers with one thing wrong. Exits with 0 if every family agrees and every bad layer
// is refused; tests/runtime/test_sanitizers.py compiles and runs it.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "claq.h"
#include "claq_check_attention.h"
#include "claq_check_quantize.h"

namespace {

int failures = 0;

void expect(bool condition, const std::string& what) {
  if (condition) return;
  std::printf("FAILED: %s\n", what.c_str());
  ++failures;
}

constexpr uint16_t kHalfOne = 0x3c00, kHalfInfinity = 0x7c00, kHalfSmall = 0x2000;

// Exactly as many elements as the format says, on the heap, so that a read past an end is seen.
struct TestLayer {
  int64_t in_features, out_features, columns[3];
  std::vector<uint32_t> codes;
  std::vector<int8_t> codebook;
  std::vector<uint16_t> scale, row_scale, order, outlier_index, outlier_value;
  std::vector<int32_t> outlier_ptr;
  std::vector<float> bias;

  int64_t stored() const { return columns[0] + columns[1] + columns[2]; }
};

TestLayer random_layer(std::mt19937& random, int64_t largest = 300) {
  const auto below = [&](int64_t limit) { return static_cast<int64_t>(random() % static_cast<uint64_t>(limit)); };
  TestLayer layer;
  layer.in_features = 1 + below(largest);
  layer.out_features = 1 + below(largest);
  int64_t blocks = (layer.in_features + 31) / 32 + below(2);
  for (int i = 0; i < 2; ++i) {
    const int64_t part = below(blocks + 1);
    layer.columns[i] = 32 * part;
    blocks -= part;
  }
  layer.columns[2] = 32 * blocks;
  const int64_t stored = layer.stored();
  layer.codes.resize(static_cast<size_t>((4 * layer.columns[0] + 3 * layer.columns[1] + 2 * layer.columns[2]) / 32 * layer.out_features));
  for (auto& word : layer.codes) word = random();
  layer.codebook.resize(static_cast<size_t>(16 * layer.columns[0] + 8 * layer.columns[1] + 4 * layer.columns[2]));
  const bool compiled = below(2);  // the compiler makes no centroid of -128, which has no negative
  for (auto& centroid : layer.codebook) centroid = std::max(static_cast<int8_t>(random()), static_cast<int8_t>(compiled ? -127 : -128));
  std::vector<uint16_t> order(static_cast<size_t>(stored), static_cast<uint16_t>(layer.in_features));
  for (int64_t k = 0; k < layer.in_features; ++k) order[static_cast<size_t>(k)] = static_cast<uint16_t>(k);
  const bool ordered = below(2);
  if (ordered) {
    std::shuffle(order.begin(), order.end(), random);
    layer.order = order;
  }
  for (const uint16_t feature : order) layer.scale.push_back(feature < layer.in_features ? kHalfSmall : 0);
  layer.row_scale.assign(static_cast<size_t>(layer.out_features), kHalfOne);
  if (below(2)) {
    layer.outlier_ptr.push_back(0);
    for (int64_t n = 0; n < layer.out_features; ++n) {
      const int64_t one_in = n == 0 ? 1 : 20;  // the first row is full
      for (int64_t p = 0; p < stored; ++p) {
        if (order[static_cast<size_t>(p)] == layer.in_features || below(one_in)) continue;
        layer.outlier_index.push_back(static_cast<uint16_t>(p));
        layer.outlier_value.push_back(static_cast<uint16_t>(0x4000 + below(0x1000)));
      }
      layer.outlier_ptr.push_back(static_cast<int32_t>(layer.outlier_index.size()));
    }
  }
  if (below(2)) layer.bias.assign(static_cast<size_t>(layer.out_features), 0.5f);
  return layer;
}

struct Handle {
  claq_layer* layer = nullptr;
  claq_status status;
  char error[512] = "";
  std::vector<std::vector<char>> moved;

  // With a shift the tensors lie that many bytes behind where their elements would be aligned.
  Handle(const TestLayer& source, const char* kernel, size_t shift = 0) {
    std::vector<std::vector<int64_t>> shapes;
    shapes.reserve(9);
    const auto tensor = [&](const auto& values, int32_t dtype, std::vector<int64_t> shape = {}) {
      if (shape.empty()) shape.push_back(static_cast<int64_t>(values.size()));
      shapes.push_back(shape);
      const void* data = values.data();
      if (shift > 0 && !values.empty()) {
        const size_t bytes = values.size() * sizeof(values[0]);
        moved.emplace_back(shift + bytes);
        std::memcpy(moved.back().data() + shift, values.data(), bytes);
        data = moved.back().data() + shift;
      }
      return claq_tensor{data, shapes.back().data(), static_cast<int32_t>(shape.size()), dtype};
    };
    claq_layer_desc desc{};
    desc.struct_size = sizeof desc;
    desc.in_features = source.in_features;
    desc.out_features = source.out_features;
    desc.columns_4 = source.columns[0];
    desc.columns_3 = source.columns[1];
    desc.columns_2 = source.columns[2];
    const int64_t words = static_cast<int64_t>(source.codes.size());
    desc.codes = tensor(source.codes, CLAQ_UINT32, {source.out_features > 0 ? words / source.out_features : 0, source.out_features});
    desc.codebook = tensor(source.codebook, CLAQ_INT8);
    desc.scale = tensor(source.scale, CLAQ_FLOAT16);
    desc.row_scale = tensor(source.row_scale, CLAQ_FLOAT16);
    desc.order = tensor(source.order, CLAQ_UINT16);
    desc.outlier_ptr = tensor(source.outlier_ptr, CLAQ_INT32);
    desc.outlier_index = tensor(source.outlier_index, CLAQ_UINT16);
    desc.outlier_value = tensor(source.outlier_value, CLAQ_FLOAT16);
    desc.bias = tensor(source.bias, CLAQ_FLOAT32);
    desc.kernel = kernel;
    status = claq_create(&desc, &layer, error, sizeof error);
  }
  ~Handle() { claq_destroy(layer); }
  Handle(const Handle&) = delete;
  Handle& operator=(const Handle&) = delete;
};

std::vector<float> run(const Handle& handle, const TestLayer& layer, const std::vector<float>& x, int32_t level, int threads) {
  const int64_t rows = static_cast<int64_t>(x.size()) / layer.in_features;
  std::vector<float> y(static_cast<size_t>(rows * layer.out_features));
  char error[256] = "";
  const claq_status status = claq_run(handle.layer, CLAQ_FLOAT32, level, x.data(), rows, y.data(),
                                      threads > 1 ? claq_pool_parallel_for : nullptr,
                                      reinterpret_cast<void*>(static_cast<uintptr_t>(threads)), error, sizeof error);
  expect(status == CLAQ_OK, error);
  return y;
}

void check_agreement(std::mt19937& random, const std::vector<std::string>& kernels, const TestLayer& layer, size_t rows) {
  std::vector<float> x(static_cast<size_t>(layer.in_features) * rows);
  for (auto& value : x) value = std::normal_distribution<float>()(random);
  const Handle portable(layer, "portable");
  expect(portable.status == CLAQ_OK, portable.error);
  const std::vector<float> exact = run(portable, layer, x, 4, 1), close = run(portable, layer, x, 0, 1);
  const Handle shifted(layer, nullptr, 1);
  expect(shifted.status == CLAQ_OK, shifted.error);
  expect(run(shifted, layer, x, 4, 1) == exact, "tensors at odd addresses differ");
  static const char* const tunings[] = {"plain", "gathers", "zen"};
  for (const std::string& kernel : kernels) {
    setenv("CLAQ_TUNING", tunings[random() % 3], 1);
    const Handle handle(layer, kernel.c_str());
    unsetenv("CLAQ_TUNING");
    expect(handle.status == CLAQ_OK, handle.error);
    expect(run(handle, layer, x, 4, 1) == exact, kernel + " differs in int8");
    expect(run(handle, layer, x, 4, 3) == exact, kernel + " differs in int8 on three threads");
    const std::vector<float> y = run(handle, layer, x, 0, 1);
    for (size_t i = 0; i < y.size(); ++i) {
      if (!(std::fabs(y[i] - close[i]) <= 1e-3f * (1 + std::fabs(close[i])))) {
        expect(false, kernel + " differs in float32");
        break;
      }
    }
  }
}

std::vector<float> gather(const Handle& handle, const TestLayer& layer, const std::vector<int64_t>& rows, int threads) {
  std::vector<float> y(rows.size() * static_cast<size_t>(layer.in_features));
  char error[256] = "";
  const claq_status status = claq_gather(handle.layer, CLAQ_INT64, rows.data(), static_cast<int64_t>(rows.size()), CLAQ_FLOAT32,
                                         y.data(), threads > 1 ? claq_pool_parallel_for : nullptr,
                                         reinterpret_cast<void*>(static_cast<uintptr_t>(threads)), error, sizeof error);
  expect(status == CLAQ_OK, error);
  return y;
}

// Rows of the weight, multiplied here, give what the layer gives.
void check_gather(std::mt19937& random) {
  const TestLayer layer = random_layer(random);
  const Handle handle(layer, "portable");
  expect(handle.status == CLAQ_OK, handle.error);
  const auto features = static_cast<size_t>(layer.in_features), outputs = static_cast<size_t>(layer.out_features);
  std::vector<int64_t> rows(outputs);
  for (size_t n = 0; n < outputs; ++n) rows[n] = static_cast<int64_t>(n) - (n % 2 ? layer.out_features : 0);
  const std::vector<float> weight = gather(handle, layer, rows, 1);
  expect(gather(handle, layer, rows, 3) == weight, "rows differ on three threads");
  std::vector<float> x(features), nothing(features);
  for (auto& value : x) value = std::normal_distribution<float>()(random);
  const std::vector<float> y = run(handle, layer, x, 0, 1), offset = run(handle, layer, nothing, 0, 1);
  for (size_t n = 0; n < outputs; ++n) {
    double sum = offset[n], magnitude = 1;
    for (size_t k = 0; k < features; ++k) {
      sum += static_cast<double>(weight[n * features + k]) * x[k];
      magnitude += std::fabs(static_cast<double>(weight[n * features + k]) * x[k]);
    }
    if (!(std::fabs(sum - y[n]) <= 1e-5 * magnitude)) {
      expect(false, "rows and products disagree");
      break;
    }
  }
  std::vector<float> row(features);
  for (const int32_t wrong : {static_cast<int32_t>(layer.out_features), static_cast<int32_t>(-layer.out_features - 1)}) {
    char error[256] = "";
    const claq_status status = claq_gather(handle.layer, CLAQ_INT32, &wrong, 1, CLAQ_FLOAT32, row.data(), nullptr, nullptr, error,
                                           sizeof error);
    expect(status == CLAQ_INVALID_ARGUMENT && std::strstr(error, "indices: element 0"), "accepted an index out of range");
  }
}

void check_concurrency(std::mt19937& random) {
  const TestLayer layer = random_layer(random);
  const Handle handle(layer, nullptr);
  std::vector<std::vector<float>> inputs, expected;
  for (const size_t rows : {1, 9, 33, 64}) {
    std::vector<float>& x = inputs.emplace_back(static_cast<size_t>(layer.in_features) * rows);
    for (auto& value : x) value = std::normal_distribution<float>()(random);
    expected.push_back(run(handle, layer, x, 4, 1));
  }
  std::vector<std::thread> threads;
  for (int t = 0; t < 6; ++t) {
    threads.emplace_back([&] {
      for (size_t i = 0; i < 20; ++i) {
        expect(run(handle, layer, inputs[i % 4], 4, 2) == expected[i % 4], "concurrent runs differ");
      }
    });
  }
  for (auto& thread : threads) thread.join();
}

void refuse(const TestLayer& layer, const char* name) {
  const Handle handle(layer, nullptr);
  expect(handle.status == CLAQ_INVALID_LAYER && handle.layer == nullptr, std::string("accepted a bad ") + name);
  expect(std::strncmp(handle.error, name, std::strlen(name)) == 0, std::string(name) + " expected in: " + handle.error);
}

void check_bad_layers(std::mt19937& random) {
  TestLayer good;
  do good = random_layer(random);
  while (good.order.empty() || good.outlier_index.size() < 2 || good.stored() == good.in_features || good.bias.empty() ||
         good.in_features < 2);
  const auto changed = [&](const char* name, auto change) {
    TestLayer layer = good;
    change(layer);
    refuse(layer, name);
  };
  changed("in_features", [](TestLayer& l) { l.in_features = 0; });
  changed("in_features", [](TestLayer& l) { l.in_features = int64_t{1} << 40; });
  changed("out_features", [](TestLayer& l) { l.out_features = -1; });
  changed("columns_3", [](TestLayer& l) { l.columns[1] = -32; });
  changed("columns_2", [](TestLayer& l) { l.columns[2] += 1; });
  changed("codes", [](TestLayer& l) { l.codes.resize(l.codes.size() - static_cast<size_t>(l.out_features)); });
  changed("codebook", [](TestLayer& l) { l.codebook.pop_back(); });
  changed("scale", [](TestLayer& l) { l.scale[0] = kHalfInfinity; });
  changed("scale", [](TestLayer& l) { std::fill(l.scale.begin(), l.scale.end(), kHalfOne); });
  changed("scale", [](TestLayer& l) { l.scale[0] |= 0x8001u; });
  changed("row_scale", [](TestLayer& l) { l.row_scale[0] = kHalfInfinity; });
  changed("row_scale", [](TestLayer& l) { l.row_scale.push_back(kHalfOne); });
  changed("order", [](TestLayer& l) { l.order[0] = 65535; });
  changed("order", [](TestLayer& l) { std::fill(l.order.begin(), l.order.end(), uint16_t{0}); });
  changed("order", [](TestLayer& l) { l.order.pop_back(); });
  changed("outlier_ptr", [](TestLayer& l) { l.outlier_ptr[0] = 1; });
  changed("outlier_ptr", [](TestLayer& l) { l.outlier_ptr[1] = -5; });
  changed("outlier_ptr", [](TestLayer& l) { l.outlier_ptr.pop_back(); });
  changed("outlier_index", [](TestLayer& l) { l.outlier_ptr.back() += 1000; });
  changed("outlier_index", [](TestLayer& l) { l.outlier_index.back() = 65535; });
  changed("outlier_index", [](TestLayer& l) { std::swap(l.outlier_index[0], l.outlier_index[1]); });
  changed("outlier_index", [](TestLayer& l) { l.outlier_ptr.clear(); });
  changed("outlier_value", [](TestLayer& l) { l.outlier_value[0] = kHalfInfinity; });
  changed("outlier_value", [](TestLayer& l) { l.outlier_value.pop_back(); });
  changed("bias", [](TestLayer& l) { l.bias.push_back(0); });
}

}  // namespace

int main() {
  std::mt19937 random(1);
  std::vector<std::string> kernels;
  std::istringstream names(claq_kernels());
  for (std::string name; names >> name;) kernels.push_back(name);
  for (int i = 0; i < 40; ++i) check_agreement(random, kernels, random_layer(random), 1 + random() % 40);
  // The first and the last numbers of rows that AMX has ways of its own for.
  for (const size_t rows : {7, 8, 12, 16, 21, 32, 33}) {
    for (int i = 0; i < 2; ++i) check_agreement(random, kernels, random_layer(random), rows);
  }
  // Of a row alone the columns are shared out if there are many weights.
  for (int i = 0; i < 8; ++i) check_agreement(random, kernels, random_layer(random, 1500), 1);
  for (int i = 0; i < 20; ++i) check_gather(random);
  for (int i = 0; i < 4; ++i) check_concurrency(random);
  check_bad_layers(random);
  for (int i = 0; i < 30; ++i) check_attention<float>(random, kernels, expect);
  for (int i = 0; i < 30; ++i) check_attention<uint16_t>(random, kernels, expect);
  check_empty_attention(expect);
  check_bad_attention(random, expect);
  for (int i = 0; i < 60; ++i) check_quantization(random, kernels, expect);
  check_bad_columns(random, expect);
  std::printf("%s: %d failures\n", claq_kernels(), failures);
  return failures ? 1 : 0;
}
