#include "layer.h"

#include <algorithm>
#include <string>

#include "../layer.h"
#include "../layout.h"
#include "launch.h"

namespace claq::cuda {
namespace {

constexpr size_t kAlignment = 256;         // of parts of the workspace
constexpr int64_t kDenseBytes = int64_t{64} << 20;  // of decoded weight at a time
constexpr int64_t kColumnsInRegisters = 16384;

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

Layer::Layer(const Tensors& tensors, const Allocate& allocate) : tensors_(tensors) {
  if (!tensors_.bias) {
    // The kernels always read one.
    const std::vector<unsigned char> zeros(static_cast<size_t>(tensors.out_features) * size_of(tensors.dtype));
    void* memory = allocate(zeros.size());
    Driver::get().to_device(memory, zeros.data(), zeros.size());
    if (!is_aligned(memory)) throw Error("the GPU's allocator gave memory that is not aligned to 16 bytes");
    tensors_.bias = memory;
  }
  Kernels& kernels = Kernels::current();
  multiprocessors_ = kernels.multiprocessors();
  const std::string type = tensors.type, index = tensors.index, o = tensors.outliers ? "1" : "0";
  const bool vector = tensors.out_features % 4 == 0;
  int widths = 0, present = 0;
  for (int i = 0; i < 3; ++i) {
    if (tensors.blocks[i]) widths = kWidths[i], ++present;
  }
  if (present > 1 || !vector) widths = 432;
  const std::string decoder = "w" + std::to_string(widths) + "_v" + (vector ? "1" : "0");

  quantize_ = &kernels.get("quantize_" + type + "_" + index + "_o" + o);
  for (int rows = 1;; ++rows) {
    const std::string name = "gemv_" + decoder + "_r" + std::to_string(rows);
    if (!kernels.package().find(name)) break;
    gemv_.push_back(&kernels.get(name));
  }
  if (gemv_.size() < 2) throw Error("the package of kernels has no gemv_" + decoder + "_r2");
  const std::string finish = "finish_" + type + "_" + (tensors.outliers ? index : "none");
  finish_one_ = &kernels.get(finish + "_m1");
  finish_four_ = &kernels.get(finish + "_m4");
  scale_activations_ = finish_scaled_ = nullptr;
  if (tensors.dtype != CLAQ_FLOAT32) {
    const int64_t room = tensors.columns <= 4096 ? 4096 : tensors.columns <= kColumnsInRegisters ? kColumnsInRegisters : 0;
    scale_activations_ = &kernels.get("scale_" + type + "_" + index + "_o" + o + "_c" + std::to_string(room));
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
      if (tensors.blocks[i]) dequantize_[i] = &kernels.get("dequantize_w" + std::to_string(kWidths[i]) + "_" + type + "_" + index);
    }
    if (tensors.outliers) add_outliers_ = &kernels.get("outliers_" + type + "_" + index);
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
  for (const int64_t blocks : tensors_.blocks) steps += divide_up(blocks, step);
  const int64_t programs = int64_t{kernel.record->programs} * multiprocessors_;
  const int64_t wanted = std::max<int64_t>(1, std::min(steps, programs / tiles));
  return divide_up(steps, divide_up(steps, wanted));
}

Layer::Plan Layer::plan(int64_t rows, bool has_blas) const {
  const int64_t K = tensors_.in_features, N = tensors_.out_features, P = tensors_.columns;
  const auto item = static_cast<int64_t>(size_of(tensors_.dtype));
  const int64_t parts = tensors_.dtype == CLAQ_FLOAT32 ? 2 : 1;  // a float32 row and its rounding error
  const bool can_decode = has_blas && set_bias_;
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
    plan.gathered = plan.take(tensors_.outliers ? P * plan.at_a_time * 4 : 0);
    plan.part = plan.take(plan.splits * plan.at_a_time * parts * N * 4);
    plan.aligned_y = plan.take(rows > most ? plan.at_a_time * N * item : 0);
  } else if (gemm) {
    plan.path = Path::kTens;
    const int64_t tile = std::min(gemm->record->tile[1], finish_scaled_->record->tile[1]);
    const int64_t at_a_time = plan.at_a_time = std::min(rows, kMostTilesOfRows * tile);
    plan.matrix = gemm;
    plan.splits = splits(*gemm, divide_up(N, gemm->record->tile[0]) * divide_up(at_a_time, gemm->record->tile[1]));
    plan.activations = plan.take(at_a_time * P * 2);
    plan.scales = plan.take(at_a_time * 4);
    plan.gathered = plan.take(tensors_.outliers ? P * at_a_time * 4 : 0);
    plan.part = plan.take(plan.splits * at_a_time * N * 4);
  } else {
    plan.path = Path::kDense;
    int64_t tile = 1;
    for (const Kernel* kernel : dequantize_) tile = kernel ? std::max<int64_t>(tile, kernel->record->tile[0]) : tile;
    plan.at_a_time = std::min(divide_up(N, tile) * tile, std::max(tile, kDenseBytes / (K * item) / tile * tile));
    plan.weight = plan.take(std::min(plan.at_a_time, N) * K * item);
  }
  return plan;
}

size_t Layer::workspace(int64_t rows, bool has_blas) const {
  if (rows <= 0) return 0;
  const Blas::State state = has_blas ? blas_.state() : Blas::State::kUnknown;
  const size_t bytes = plan(rows, state == Blas::State::kFound).total;
  // One that is loaded before the run is used by it.
  return state == Blas::State::kNotLoaded ? std::max(bytes, plan(rows, true).total) : bytes;
}

void Layer::run(const void* x, int64_t rows, void* y, void* workspace, Stream stream, void* blas) const {
  if (rows <= 0) return;
  if (!is_aligned(y)) throw InvalidArgument("y: its memory is not aligned to 16 bytes");
  const Plan plan = this->plan(rows, blas && blas_.state() == Blas::State::kFound);
  auto* memory = static_cast<char*>(workspace);
  const size_t item = size_of(tensors_.dtype);
  if (!is_aligned(x)) {
    Driver::get().copy(memory + plan.aligned_x, x, static_cast<size_t>(rows * tensors_.in_features) * item, stream);
    x = memory + plan.aligned_x;
  }
  switch (plan.path) {
    case Path::kFew: return few(plan, x, y, memory, stream);
    case Path::kTens: return tens(plan, x, y, memory, stream);
    case Path::kDense: return dense(plan, x, y, memory, stream, blas);
  }
}

Launch Layer::prepare(const Kernel& kernel, const Plan& plan, const void* x, int64_t rows, char* memory, Stream stream) const {
  Launch launch(kernel, stream);
  launch.pointer(x)
      .pointer(tensors_.order)
      .pointer(tensors_.scale)
      .pointer(memory + plan.activations)
      .pointer(memory + plan.scales)
      .pointer(memory + plan.gathered)
      .integer(rows)
      .integer(tensors_.in_features)
      .integer(tensors_.columns)
      .integer(tensors_.blocks[0])
      .integer(tensors_.blocks[1]);
  return launch;
}

void Layer::finish(const Kernel& kernel, const void* part, const void* scales, const void* gathered, void* y, int64_t rows,
                   int64_t splits, Stream stream) const {
  Launch(kernel, stream)
      .pointer(part)
      .pointer(scales)
      .pointer(gathered)
      .pointer(tensors_.row_scale)
      .pointer(tensors_.outlier_ptr)
      .pointer(tensors_.outlier_index)
      .pointer(tensors_.outlier_value)
      .pointer(tensors_.bias)
      .pointer(y)
      .integer(rows)
      .integer(tensors_.out_features)
      .integer(splits)
      .over(divide_up(tensors_.out_features, kernel.record->tile[0]), divide_up(rows, kernel.record->tile[1]));
}

void Layer::few(const Plan& plan, const void* x, void* y, char* memory, Stream stream) const {
  const int64_t K = tensors_.in_features, N = tensors_.out_features, P = tensors_.columns;
  const int64_t parts = tensors_.dtype == CLAQ_FLOAT32 ? 2 : 1;
  const auto item = static_cast<int64_t>(size_of(tensors_.dtype));
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
    prepare(*quantize_, plan, xs, rows, memory, stream).over(divide_up(P, kBlock * int64_t{quantize_->record->tile[2]}), rows);
    Launch(gemv, stream)
        .pointer(tensors_.codes)
        .pointer(tensors_.codebook)
        .pointer(memory + plan.activations)
        .pointer(memory + plan.scales)
        .pointer(memory + plan.part)
        .integer(N)
        .integer(P)
        .integer(tensors_.blocks[0])
        .integer(tensors_.blocks[1])
        .integer(tensors_.blocks[2])
        .integer(plan.splits)
        .over(divide_up(N, gemv.record->tile[0]), plan.splits);
    finish(rows == 1 ? *finish_one_ : *finish_four_, memory + plan.part, memory + plan.part, memory + plan.gathered,
           target, rows, plan.splits, stream);
    if (target != ys) Driver::get().copy(ys, target, static_cast<size_t>(rows * N * item), stream);
  }
}

void Layer::tens(const Plan& plan, const void* x, void* y, char* memory, Stream stream) const {
  const int64_t K = tensors_.in_features, N = tensors_.out_features, P = tensors_.columns;
  const auto item = static_cast<int64_t>(size_of(tensors_.dtype));
  for (int64_t first = 0; first < plan.rows; first += plan.at_a_time) {
    const int64_t rows = std::min(plan.at_a_time, plan.rows - first);
    prepare(*scale_activations_, plan, static_cast<const char*>(x) + first * K * item, rows, memory, stream).over(rows);
    Launch(*plan.matrix, stream)
        .pointer(tensors_.codes)
        .pointer(tensors_.codebook)
        .pointer(memory + plan.activations)
        .pointer(memory + plan.part)
        .integer(rows)
        .integer(N)
        .integer(P)
        .integer(tensors_.blocks[0])
        .integer(tensors_.blocks[1])
        .integer(tensors_.blocks[2])
        .integer(plan.splits)
        .over(divide_up(N, plan.matrix->record->tile[0]), divide_up(rows, plan.matrix->record->tile[1]), plan.splits);
    finish(*finish_scaled_, memory + plan.part, memory + plan.scales, memory + plan.gathered, static_cast<char*>(y) + first * N * item,
           rows, plan.splits, stream);
  }
}

void Layer::dense(const Plan& plan, const void* x, void* y, char* memory, Stream stream, void* blas) const {
  const int64_t rows = plan.rows, K = tensors_.in_features, N = tensors_.out_features;
  const auto item = static_cast<int64_t>(size_of(tensors_.dtype));
  void* weight = memory + plan.weight;
  const int64_t biased = kMostTilesOfRows * set_bias_->record->tile[1];
  for (int64_t first = 0; first < rows; first += biased) {
    // No splits: y = bias.
    finish(*set_bias_, weight, weight, weight, static_cast<char*>(y) + first * N * item, std::min(biased, rows - first), 0, stream);
  }
  for (int64_t first = 0; first < N; first += plan.at_a_time) {
    const int64_t features = std::min(plan.at_a_time, N - first);
    const auto* codebook = static_cast<const char*>(tensors_.codebook);
    int64_t row = 0, block = 0;
    for (int i = 0; i < 3; ++i) {
      if (!tensors_.blocks[i]) continue;
      const Kernel& kernel = *dequantize_[i];
      Launch(kernel, stream)
          .pointer(tensors_.codes)
          .pointer(codebook)
          .pointer(tensors_.scale)
          .pointer(tensors_.row_scale)
          .pointer(tensors_.order)
          .pointer(weight)
          .integer(N)
          .integer(K)
          .integer(first)
          .integer(features)
          .integer(tensors_.blocks[i])
          .integer(row)
          .integer(block)
          .over(divide_up(features, kernel.record->tile[0]), divide_up(tensors_.blocks[i], kernel.record->tile[2]));
      codebook += (int64_t{kBlock} << kWidths[i]) * tensors_.blocks[i];
      row += kWidths[i] * tensors_.blocks[i];
      block += tensors_.blocks[i];
    }
    if (tensors_.outliers) {
      Launch(*add_outliers_, stream)
          .pointer(tensors_.codes)
          .pointer(tensors_.codebook)
          .pointer(tensors_.scale)
          .pointer(tensors_.row_scale)
          .pointer(tensors_.order)
          .pointer(tensors_.outlier_ptr)
          .pointer(tensors_.outlier_index)
          .pointer(tensors_.outlier_value)
          .pointer(weight)
          .integer(N)
          .integer(first)
          .integer(features)
          .integer(tensors_.blocks[0])
          .integer(tensors_.blocks[1])
          .over(divide_up(features, add_outliers_->record->tile[0]));
    }
    const Number number = tensors_.dtype == CLAQ_FLOAT32   ? Number::kFloat32
                          : tensors_.dtype == CLAQ_FLOAT16 ? Number::kFloat16
                                                           : Number::kBfloat16;
    blas_.multiply_add(blas, number, x, weight, static_cast<char*>(y) + first * item, static_cast<int>(rows),
                       static_cast<int>(features), static_cast<int>(K), static_cast<int>(N));
  }
}

}  // namespace claq::cuda
