#include "layer.h"

#include <algorithm>
#include <cstring>
#include <string>

#include "../layer.h"
#include "../layout.h"
#include "../validate.h"

namespace claq::cuda {
namespace {

constexpr size_t kAlignment = 256;         // of parts of the workspace
constexpr uintptr_t kPointerAlignment = 16;  // what the kernels are compiled for
constexpr int64_t kDenseBytes = int64_t{64} << 20;  // of decoded weight at a time
constexpr int64_t kColumnsInRegisters = 16384;
constexpr int kWidths[3] = {4, 3, 2};

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % kPointerAlignment == 0; }

size_t size_of(int32_t dtype) {
  switch (dtype) {
    case CLAQ_INT8: return 1;
    case CLAQ_UINT16:
    case CLAQ_FLOAT16:
    case CLAQ_BFLOAT16: return 2;
    default: return 4;
  }
}

size_t bytes_of(const claq_tensor& tensor) {
  size_t count = size_of(tensor.dtype);
  for (int32_t i = 0; i < tensor.rank; ++i) count *= static_cast<size_t>(std::max<int64_t>(0, tensor.shape[i]));
  return count;
}

const char* name_of(claq_dtype dtype) {
  switch (dtype) {
    case CLAQ_FLOAT32: return "fp32";
    case CLAQ_FLOAT16: return "fp16";
    case CLAQ_BFLOAT16: return "bf16";
    default: throw InvalidArgument("x: expected float32, float16 or bfloat16");
  }
}

const char* name_of_index(int32_t dtype) { return dtype == CLAQ_UINT16 ? "u16" : "i32"; }

// Checks a layer whose tensors are on a device: validation reads copies of all but the codes, any of which is valid.
void validate_on_host(claq_layer_desc desc) {
  const Driver& driver = Driver::get();
  std::vector<std::vector<unsigned char>> copies;
  for (claq_tensor* tensor : {&desc.codebook, &desc.scale, &desc.row_scale, &desc.order, &desc.outlier_ptr, &desc.outlier_index,
                              &desc.outlier_value, &desc.bias}) {
    if (tensor->rank != 1 || !tensor->shape || !tensor->data) continue;  // validate says what is wrong with it
    auto& copy = copies.emplace_back(std::max<size_t>(1, bytes_of(*tensor)));
    driver.to_host(copy.data(), tensor->data, bytes_of(*tensor));
    tensor->data = copy.data();
  }
  validate(desc);
}

// A launch: the kernel's parameters in order, checked against the letters of its record.
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
    if (x > INT32_MAX || y > 65535 || z > 65535) throw InvalidArgument("x: has too many rows for one launch on the GPU");
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

}  // namespace

// What a run does, and where its parts lie in the workspace.
struct Layer::Plan {
  Path path;
  int64_t rows;
  int64_t at_a_time;  // rows of x; output features for kDense
  const Kernel* matrix = nullptr;
  int64_t splits = 1;
  size_t aligned_x = 0, activations = 0, scales = 0, gathered = 0, part = 0, aligned_y = 0, weight = 0;
  size_t total = 0;

  size_t take(int64_t bytes) {
    const size_t offset = total;
    total += (static_cast<size_t>(bytes) + kAlignment - 1) / kAlignment * kAlignment;
    return offset;
  }
};

Layer::Layer(const claq_layer_desc& desc, claq_dtype dtype, const Allocate& allocate) : dtype_(dtype) {
  validate_on_host(desc);
  in_features_ = desc.in_features;
  out_features_ = desc.out_features;
  columns_ = desc.columns_4 + desc.columns_3 + desc.columns_2;
  const int64_t columns[3] = {desc.columns_4, desc.columns_3, desc.columns_2};
  for (int i = 0; i < 3; ++i) blocks_[i] = columns[i] / kBlock;
  codes_ = desc.codes.data;
  codebook_ = desc.codebook.data;
  scale_ = desc.scale.data;
  row_scale_ = desc.row_scale.data;
  order_ = desc.order.data;
  outlier_ptr_ = desc.outlier_ptr.data;
  outlier_index_ = desc.outlier_index.data;
  outlier_value_ = desc.outlier_value.data;
  bias_ = desc.bias.data;
  outliers_ = desc.outlier_ptr.shape[0] != 0;

  const Driver& driver = Driver::get();
  // The kernels always read an order and a bias.
  int32_t order_dtype = desc.order.dtype;
  if (desc.order.shape[0] == 0) {
    order_dtype = in_features_ <= 65535 ? CLAQ_UINT16 : CLAQ_INT32;
    std::vector<unsigned char> identity(static_cast<size_t>(columns_) * size_of(order_dtype));
    for (int64_t p = 0; p < columns_; ++p) {
      const auto feature = static_cast<int32_t>(std::min(p, in_features_));
      std::memcpy(&identity[static_cast<size_t>(p) * size_of(order_dtype)], &feature, size_of(order_dtype));
    }
    void* memory = allocate(identity.size());
    driver.to_device(memory, identity.data(), identity.size());
    order_ = memory;
  }
  if (desc.bias.shape[0] == 0) {
    const std::vector<unsigned char> zeros(static_cast<size_t>(out_features_) * size_of(dtype));
    void* memory = allocate(zeros.size());
    driver.to_device(memory, zeros.data(), zeros.size());
    bias_ = memory;
  } else if (desc.bias.dtype != dtype) {
    throw InvalidLayer("bias: on a GPU its type must be that of x");
  }
  for (const auto& [name, pointer] : {std::pair{"codes", codes_}, {"codebook", codebook_}, {"scale", scale_}, {"row_scale", row_scale_},
                                      {"order", order_}, {"bias", bias_}, {"outlier_ptr", outlier_ptr_},
                                      {"outlier_index", outlier_index_}, {"outlier_value", outlier_value_}}) {
    if (!is_aligned(pointer)) throw InvalidLayer(std::string(name) + ": its memory is not aligned to 16 bytes");
  }

  Kernels& kernels = Kernels::current();
  multiprocessors_ = kernels.multiprocessors();
  const std::string type = name_of(dtype), o = outliers_ ? "1" : "0", order = name_of_index(order_dtype);
  const std::string index = name_of_index(desc.outlier_index.dtype);
  const bool vector = out_features_ % 4 == 0;
  int widths = 0, present = 0;
  for (int i = 0; i < 3; ++i) {
    if (blocks_[i]) widths = kWidths[i], ++present;
  }
  if (present > 1 || !vector) widths = 432;
  const std::string decoder = "w" + std::to_string(widths) + "_v" + (vector ? "1" : "0");

  quantize_ = &kernels.get("quantize_" + type + "_" + order + "_o" + o);
  for (int rows = 1;; ++rows) {
    const std::string name = "gemv_" + decoder + "_r" + std::to_string(rows);
    if (!kernels.package().find(name)) break;
    gemv_.push_back(&kernels.get(name));
  }
  if (gemv_.size() < 2) throw Error("the package of kernels has no gemv_" + decoder + "_r2");
  const std::string finish = "finish_" + type + "_" + (outliers_ ? index : "none");
  finish_one_ = &kernels.get(finish + "_m1");
  finish_four_ = &kernels.get(finish + "_m4");
  scale_activations_ = finish_scaled_ = nullptr;
  if (dtype != CLAQ_FLOAT32) {
    const int64_t room = columns_ <= 4096 ? 4096 : columns_ <= kColumnsInRegisters ? kColumnsInRegisters : 0;
    scale_activations_ = &kernels.get("scale_" + type + "_" + order + "_o" + o + "_c" + std::to_string(room));
    finish_scaled_ = &kernels.get(finish + "_m16");
    const std::string prefix = "gemm_" + decoder + "_m";
    for (const Record& record : kernels.package().records()) {
      if (record.name.compare(0, prefix.size(), prefix) == 0) gemm_.push_back(&kernels.get(record.name));
    }
    std::sort(gemm_.begin(), gemm_.end(), [](auto* a, auto* b) { return a->record->most_vectors < b->record->most_vectors; });
  }
  add_outliers_ = set_bias_ = nullptr;
  std::fill(std::begin(dequantize_), std::end(dequantize_), nullptr);
  if (vector) {
    for (int i = 0; i < 3; ++i) {
      if (blocks_[i]) dequantize_[i] = &kernels.get("dequantize_w" + std::to_string(kWidths[i]) + "_" + type + "_" + order);
    }
    if (outliers_) {
      // The kernel is compiled for one type of both indices; the two differ only above 65535 columns.
      add_outliers_ = order == index ? &kernels.get("outliers_" + type + "_" + order) : nullptr;
    }
    set_bias_ = &kernels.get("finish_" + type + "_none_m4");
  }
}

const Kernel* Layer::tensor_core_kernel(int64_t rows) const {
  for (const Kernel* kernel : gemm_) {
    if (rows <= kernel->record->most_vectors) return kernel;
  }
  return nullptr;
}

// Into how many parts the columns are split, so that about as many programs run as the package asks for, and none is idle.
int64_t Layer::splits(const Kernel& kernel, int64_t tiles) const {
  const int64_t step = std::max<int64_t>(1, kernel.record->tile[2]);
  int64_t steps = 0;
  for (const int64_t blocks : blocks_) steps += divide_up(blocks, step);
  const int64_t programs = int64_t{kernel.record->programs} * multiprocessors_;
  const int64_t wanted = std::max<int64_t>(1, std::min(steps, programs / tiles));
  return divide_up(steps, divide_up(steps, wanted));
}

Layer::Plan Layer::plan(int64_t rows, bool has_blas) const {
  const int64_t K = in_features_, N = out_features_, P = columns_;
  const auto item = static_cast<int64_t>(size_of(dtype_));
  const int64_t parts = dtype_ == CLAQ_FLOAT32 ? 2 : 1;  // a float32 row and its rounding error
  const bool can_decode = has_blas && set_bias_ && (!outliers_ || add_outliers_);
  const int64_t most = std::min<int64_t>(static_cast<int64_t>(gemv_.size()), gemv_[0]->record->most_vectors) / parts;
  Plan plan{};
  plan.rows = rows;
  plan.aligned_x = plan.take(rows * K * item);
  const Kernel* gemm = gemm_.empty() ? nullptr : tensor_core_kernel(rows);
  if (!gemm && !gemm_.empty() && !can_decode) gemm = gemm_.back();
  if (rows <= most || (!gemm && !can_decode)) {
    plan.path = Path::kFew;
    plan.at_a_time = std::min(rows, most);
    plan.matrix = gemv_[static_cast<size_t>(plan.at_a_time * parts - 1)];
    plan.splits = splits(*plan.matrix, divide_up(N, plan.matrix->record->tile[0]));
    plan.activations = plan.take(plan.at_a_time * parts * P * 2);
    plan.scales = plan.take(plan.at_a_time * parts * (P / kBlock) * 4);
    plan.gathered = plan.take(outliers_ ? P * plan.at_a_time * 4 : 0);
    plan.part = plan.take(plan.splits * plan.at_a_time * parts * N * 4);
    plan.aligned_y = plan.take(rows > most ? plan.at_a_time * N * item : 0);
  } else if (gemm) {
    plan.path = Path::kTens;
    plan.at_a_time = rows;
    plan.matrix = gemm;
    plan.splits = splits(*gemm, divide_up(N, gemm->record->tile[0]) * divide_up(rows, gemm->record->tile[1]));
    plan.activations = plan.take(rows * P * 2);
    plan.scales = plan.take(rows * 4);
    plan.gathered = plan.take(outliers_ ? P * rows * 4 : 0);
    plan.part = plan.take(plan.splits * rows * N * 4);
  } else {
    plan.path = Path::kDense;
    int64_t tile = 1;
    for (const Kernel* kernel : dequantize_) tile = kernel ? std::max<int64_t>(tile, kernel->record->tile[0]) : tile;
    plan.at_a_time = std::min(divide_up(N, tile) * tile, std::max(tile, kDenseBytes / (K * item) / tile * tile));
    plan.weight = plan.take(std::min(plan.at_a_time, N) * K * item);
  }
  return plan;
}

size_t Layer::workspace(int64_t rows, bool has_blas) const { return rows <= 0 ? 0 : plan(rows, has_blas).total; }

void Layer::run(const void* x, int64_t rows, void* y, void* workspace, Stream stream, void* blas) const {
  if (rows <= 0) return;
  if (!is_aligned(y)) throw InvalidArgument("y: its memory is not aligned to 16 bytes");
  if (!Blas::get()) blas = nullptr;
  const Plan plan = this->plan(rows, blas != nullptr);
  auto* memory = static_cast<char*>(workspace);
  const size_t item = size_of(dtype_);
  if (!is_aligned(x)) {
    Driver::get().copy(memory + plan.aligned_x, x, static_cast<size_t>(rows * in_features_) * item, stream);
    x = memory + plan.aligned_x;
  }
  switch (plan.path) {
    case Path::kFew: return few(plan, x, y, memory, stream);
    case Path::kTens: return tens(plan, x, y, memory, stream);
    case Path::kDense: return dense(plan, x, y, memory, stream, blas);
  }
}

void Layer::finish(const Kernel& kernel, const void* part, const void* scales, const void* gathered, void* y, int64_t rows,
                   int64_t splits, Stream stream) const {
  Launch(kernel, stream)
      .pointer(part)
      .pointer(scales)
      .pointer(gathered)
      .pointer(row_scale_)
      .pointer(outlier_ptr_)
      .pointer(outlier_index_)
      .pointer(outlier_value_)
      .pointer(bias_)
      .pointer(y)
      .integer(rows)
      .integer(out_features_)
      .integer(splits)
      .over(divide_up(out_features_, kernel.record->tile[0]), divide_up(rows, kernel.record->tile[1]));
}

void Layer::few(const Plan& plan, const void* x, void* y, char* memory, Stream stream) const {
  const int64_t parts = dtype_ == CLAQ_FLOAT32 ? 2 : 1, K = in_features_, N = out_features_, P = columns_;
  const auto item = static_cast<int64_t>(size_of(dtype_));
  for (int64_t first = 0; first < plan.rows; first += plan.at_a_time) {
    const int64_t rows = std::min(plan.at_a_time, plan.rows - first);
    const Kernel& gemv = *gemv_[static_cast<size_t>(rows * parts - 1)];
    // Slices of x and y that start between the 16 bytes the kernels are compiled for take a way round.
    const auto* xs = static_cast<const char*>(x) + first * K * item;
    auto* ys = static_cast<char*>(y) + first * N * item;
    void* target = is_aligned(ys) ? ys : memory + plan.aligned_y;
    if (!is_aligned(xs)) {
      Driver::get().copy(memory + plan.aligned_x, xs, static_cast<size_t>(rows * K * item), stream);
      xs = memory + plan.aligned_x;
    }
    Launch(*quantize_, stream)
        .pointer(xs)
        .pointer(order_)
        .pointer(scale_)
        .pointer(memory + plan.activations)
        .pointer(memory + plan.scales)
        .pointer(memory + plan.gathered)
        .integer(rows)
        .integer(K)
        .integer(P)
        .integer(blocks_[0])
        .integer(blocks_[1])
        .over(divide_up(P, kBlock * int64_t{quantize_->record->tile[2]}), rows);
    Launch(gemv, stream)
        .pointer(codes_)
        .pointer(codebook_)
        .pointer(memory + plan.activations)
        .pointer(memory + plan.scales)
        .pointer(memory + plan.part)
        .integer(N)
        .integer(P)
        .integer(blocks_[0])
        .integer(blocks_[1])
        .integer(blocks_[2])
        .integer(plan.splits)
        .over(divide_up(N, gemv.record->tile[0]), plan.splits);
    finish(rows == 1 ? *finish_one_ : *finish_four_, memory + plan.part, memory + plan.part, memory + plan.gathered,
           target, rows, plan.splits, stream);
    if (target != ys) Driver::get().copy(ys, target, static_cast<size_t>(rows * N * item), stream);
  }
}

void Layer::tens(const Plan& plan, const void* x, void* y, char* memory, Stream stream) const {
  const int64_t rows = plan.rows, K = in_features_, N = out_features_, P = columns_;
  Launch(*scale_activations_, stream)
      .pointer(x)
      .pointer(order_)
      .pointer(scale_)
      .pointer(memory + plan.activations)
      .pointer(memory + plan.scales)
      .pointer(memory + plan.gathered)
      .integer(rows)
      .integer(K)
      .integer(P)
      .integer(blocks_[0])
      .integer(blocks_[1])
      .over(rows);
  Launch(*plan.matrix, stream)
      .pointer(codes_)
      .pointer(codebook_)
      .pointer(memory + plan.activations)
      .pointer(memory + plan.part)
      .integer(rows)
      .integer(N)
      .integer(P)
      .integer(blocks_[0])
      .integer(blocks_[1])
      .integer(blocks_[2])
      .integer(plan.splits)
      .over(divide_up(N, plan.matrix->record->tile[0]), divide_up(rows, plan.matrix->record->tile[1]), plan.splits);
  finish(*finish_scaled_, memory + plan.part, memory + plan.scales, memory + plan.gathered, y, rows, plan.splits, stream);
}

void Layer::dense(const Plan& plan, const void* x, void* y, char* memory, Stream stream, void* blas) const {
  const int64_t rows = plan.rows, K = in_features_, N = out_features_;
  const auto item = static_cast<int64_t>(size_of(dtype_));
  void* weight = memory + plan.weight;
  finish(*set_bias_, weight, weight, weight, y, rows, 0, stream);  // no splits: y = bias
  for (int64_t first = 0; first < N; first += plan.at_a_time) {
    const int64_t features = std::min(plan.at_a_time, N - first);
    const auto* codebook = static_cast<const char*>(codebook_);
    int64_t row = 0, block = 0;
    for (int i = 0; i < 3; ++i) {
      if (!blocks_[i]) continue;
      const Kernel& kernel = *dequantize_[i];
      Launch(kernel, stream)
          .pointer(codes_)
          .pointer(codebook)
          .pointer(scale_)
          .pointer(row_scale_)
          .pointer(order_)
          .pointer(weight)
          .integer(N)
          .integer(K)
          .integer(first)
          .integer(features)
          .integer(blocks_[i])
          .integer(row)
          .integer(block)
          .over(divide_up(features, kernel.record->tile[0]), divide_up(blocks_[i], kernel.record->tile[2]));
      codebook += (int64_t{kBlock} << kWidths[i]) * blocks_[i];
      row += kWidths[i] * blocks_[i];
      block += blocks_[i];
    }
    if (outliers_) {
      Launch(*add_outliers_, stream)
          .pointer(codes_)
          .pointer(codebook_)
          .pointer(scale_)
          .pointer(row_scale_)
          .pointer(order_)
          .pointer(outlier_ptr_)
          .pointer(outlier_index_)
          .pointer(outlier_value_)
          .pointer(weight)
          .integer(N)
          .integer(first)
          .integer(features)
          .integer(blocks_[0])
          .integer(blocks_[1])
          .over(divide_up(features, add_outliers_->record->tile[0]));
    }
    const Number number = dtype_ == CLAQ_FLOAT32 ? Number::kFloat32 : dtype_ == CLAQ_FLOAT16 ? Number::kFloat16 : Number::kBfloat16;
    Blas::get()->multiply_add(blas, number, x, weight, static_cast<char*>(y) + first * item, static_cast<int>(rows),
                              static_cast<int>(features), static_cast<int>(K), static_cast<int>(N));
  }
}

}  // namespace claq::cuda
