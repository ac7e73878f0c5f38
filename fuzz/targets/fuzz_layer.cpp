// libFuzzer target of libclaq: a layer with whatever attributes, shapes, dtypes and contents the input says. If the library
// accepts it, the layer is run and rows are gathered with every kernel family; under the sanitizers, a read or write outside
// of the (exactly sized) tensors or any undefined behaviour is a finding, and so is an accepted layer that cannot run.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

#include "claq.h"

namespace {

// Reads the input byte by byte; zeros when it is used up.
class Input {
 public:
  Input(const uint8_t* data, size_t size) : data_(data), size_(size) {}
  uint8_t byte() { return at_ < size_ ? data_[at_++] : 0; }
  int64_t number() {
    uint64_t value = 0;
    for (int i = 0; i < 8; ++i) value = value << 8 | byte();
    return static_cast<int64_t>(value);
  }
  bool ended() const { return at_ >= size_; }

 private:
  const uint8_t* data_;
  size_t size_, at_ = 0;
};

struct Tensor {
  std::unique_ptr<uint8_t[]> data;  // exactly as long as shape and dtype say
  std::vector<int64_t> shape;
  int32_t dtype;
  size_t bytes = 0;

  claq_tensor view() const { return {data.get(), shape.data(), static_cast<int32_t>(shape.size()), dtype}; }
};

size_t item_size(int32_t dtype) {
  switch (dtype) {
    case CLAQ_INT8: return 1;
    case CLAQ_UINT16: case CLAQ_FLOAT16: case CLAQ_BFLOAT16: return 2;
    case CLAQ_INT64: return 8;
    default: return 4;
  }
}

constexpr int32_t kDtypes[] = {CLAQ_FLOAT32, CLAQ_INT8, CLAQ_UINT16, CLAQ_INT32, CLAQ_FLOAT16, CLAQ_UINT32, CLAQ_BFLOAT16, CLAQ_INT64};

// A tensor as the format wants it, or with one thing about it changed.
Tensor make(Input& input, std::vector<int64_t> shape, int32_t dtype) {
  const uint8_t change = input.byte();
  if (change == 1) dtype = kDtypes[input.byte() % 8];
  if (change == 2 && !shape.empty()) shape[input.byte() % shape.size()] = input.byte();
  if (change == 3) shape.push_back(1);
  if (change == 4) shape.clear();
  Tensor tensor{nullptr, std::move(shape), dtype};
  int64_t elements = 1;
  for (int64_t size : tensor.shape) elements *= size;
  tensor.bytes = static_cast<size_t>(elements) * item_size(dtype);
  tensor.data = std::make_unique<uint8_t[]>(tensor.bytes);
  return tensor;
}

void fill(Input& input, Tensor& tensor, uint8_t seed) {
  uint32_t state = seed * 2654435761u + 1;
  for (size_t i = 0; i < tensor.bytes; ++i) {
    state = state * 1664525u + 1013904223u;
    tensor.data[i] = input.ended() || i >= 64 ? static_cast<uint8_t>(state >> 24) : input.byte();
  }
}

template <class T>
void store(Tensor& tensor, size_t i, int64_t value) {
  if ((i + 1) * sizeof(T) <= tensor.bytes) {
    const T narrow = static_cast<T>(value);
    std::memcpy(tensor.data.get() + i * sizeof(T), &narrow, sizeof narrow);
  }
}

std::vector<std::string> families() {
  std::istringstream names(claq_kernels());
  std::vector<std::string> result;
  for (std::string name; names >> name;) result.push_back(name);
  return result;
}

[[noreturn]] void finding(const char* what, const char* error) {
  std::fprintf(stderr, "FINDING: %s: %s\n", what, error);
  std::abort();
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const std::vector<std::string> names = families();
  Input input(data, size);
  const uint8_t mode = input.byte(), seed = input.byte();
  claq_layer_desc desc{};
  desc.struct_size = sizeof desc;
  desc.in_features = 1 + input.byte() % 160;
  desc.out_features = 1 + input.byte() % 80;
  int64_t blocks = (desc.in_features + 31) / 32 + (mode & 1);
  int64_t columns[3];
  columns[0] = 32 * (input.byte() % (blocks + 1));
  columns[1] = 32 * (input.byte() % (blocks - columns[0] / 32 + 1));
  columns[2] = 32 * (blocks - (columns[0] + columns[1]) / 32);
  const int64_t stored = columns[0] + columns[1] + columns[2];
  const bool ordered = mode & 2 || stored != 32 * ((desc.in_features + 31) / 32);
  const bool outliers = mode & 4;
  const int64_t count = outliers ? 1 + input.byte() % 40 : 0;

  Tensor codes = make(input, {(4 * columns[0] + 3 * columns[1] + 2 * columns[2]) / 32, desc.out_features}, CLAQ_UINT32);
  Tensor codebook = make(input, {16 * columns[0] + 8 * columns[1] + 4 * columns[2]}, CLAQ_INT8);
  Tensor scale = make(input, {stored}, CLAQ_FLOAT16);
  Tensor row_scale = make(input, {desc.out_features}, CLAQ_FLOAT16);
  Tensor order = make(input, {ordered ? stored : 0}, CLAQ_UINT16);
  Tensor ptr = make(input, {outliers ? desc.out_features + 1 : 0}, CLAQ_INT32);
  Tensor index = make(input, {count}, CLAQ_UINT16);
  Tensor value = make(input, {count}, CLAQ_FLOAT16);
  Tensor bias = make(input, {mode & 8 ? desc.out_features : 0}, kDtypes[input.byte() % 3 * 3 % 8]);

  // Contents that the format accepts, ...
  fill(input, codes, seed);
  fill(input, codebook, seed);
  fill(input, bias, seed);
  for (int64_t p = 0; p < stored; ++p) store<uint16_t>(scale, static_cast<size_t>(p), p < desc.in_features ? 0x3000 + p * seed % 1024 : 0);
  for (int64_t n = 0; n < desc.out_features; ++n) store<uint16_t>(row_scale, static_cast<size_t>(n), 0x3c00 + n * seed % 512);
  for (int64_t p = 0; p < stored; ++p) store<uint16_t>(order, static_cast<size_t>(p), std::min(p, desc.in_features));
  const int64_t first_row = outliers ? input.byte() % desc.out_features : 0;
  for (int64_t n = 0; n <= desc.out_features; ++n) store<int32_t>(ptr, static_cast<size_t>(n), n > first_row ? count : 0);
  for (int64_t i = 0; i < count; ++i) {
    store<uint16_t>(index, static_cast<size_t>(i), i);
    store<uint16_t>(value, static_cast<size_t>(i), 0x3800);
  }
  // ... and edits of it: tensor, place, value.
  Tensor* const all[] = {&codes, &codebook, &scale, &row_scale, &order, &ptr, &index, &value, &bias};
  for (int edits = input.byte() % 8; edits > 0; --edits) {
    Tensor& tensor = *all[input.byte() % 9];
    const size_t place = input.byte() | static_cast<size_t>(input.byte()) << 8;
    const uint8_t byte = input.byte();
    if (tensor.bytes) tensor.data[place % tensor.bytes] = byte;
  }
  desc.columns_4 = columns[0];
  desc.columns_3 = columns[1];
  desc.columns_2 = columns[2];
  // Attributes of any value: nothing may be read before they are found to be believable.
  int64_t* const attributes[] = {&desc.in_features, &desc.out_features, &desc.columns_4, &desc.columns_3, &desc.columns_2};
  if (mode & 16) *attributes[input.byte() % 5] = input.number();
  desc.codes = codes.view();
  desc.codebook = codebook.view();
  desc.scale = scale.view();
  desc.row_scale = row_scale.view();
  desc.order = order.view();
  desc.outlier_ptr = ptr.view();
  desc.outlier_index = index.view();
  desc.outlier_value = value.view();
  desc.bias = bias.view();
  const std::string& name = names[input.byte() % names.size()];
  desc.kernel = name.c_str();

  char error[512] = "";
  claq_layer* layer = nullptr;
  const claq_status status = claq_create(&desc, &layer, error, sizeof error);
  if (status != CLAQ_OK) {
    if (layer) finding("a refused layer was returned", error);
    if (status != CLAQ_INVALID_LAYER && status != CLAQ_INVALID_ARGUMENT) finding("refused for another reason", error);
    if (!error[0]) finding("refused without a reason", "");
    return 0;
  }
  constexpr int32_t kFloats[] = {CLAQ_FLOAT32, CLAQ_FLOAT16, CLAQ_BFLOAT16};
  constexpr int32_t kLevels[] = {0, 1, 4};
  const int32_t dtype = kFloats[input.byte() % 3];
  const int64_t rows = input.byte() % 20;
  Tensor x = make(input, {}, dtype);
  x.bytes = static_cast<size_t>(rows * desc.in_features) * item_size(dtype);
  x.data = std::make_unique<uint8_t[]>(x.bytes);
  fill(input, x, seed);
  const auto y = std::make_unique<uint8_t[]>(static_cast<size_t>(rows * desc.out_features) * item_size(dtype));
  if (claq_run(layer, static_cast<claq_dtype>(dtype), kLevels[input.byte() % 3], x.data.get(), rows, y.get(), nullptr, nullptr, error,
               sizeof error) != CLAQ_OK) {
    finding("an accepted layer does not run", error);
  }
  std::vector<int64_t> indices;
  for (int i = input.byte() % 5; i > 0; --i) indices.push_back(mode & 32 ? input.number() : input.byte());
  const auto taken = std::make_unique<uint8_t[]>(indices.size() * static_cast<size_t>(desc.in_features) * item_size(dtype));
  claq_gather(layer, CLAQ_INT64, indices.data(), static_cast<int64_t>(indices.size()), static_cast<claq_dtype>(dtype), taken.get(),
              nullptr, nullptr, error, sizeof error);
  claq_destroy(layer);
  return 0;
}
