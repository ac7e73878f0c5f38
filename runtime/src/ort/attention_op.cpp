// ClaqCachedAttention on the CPU: attention of new tokens to a cache and themselves, and the longer cache.
#include "../attention/attention.h"

#include <memory>
#include <string>

#include "operator.h"

namespace claq::ort {
namespace {

constexpr const char* kName = "ClaqCachedAttention";

enum Input : size_t { kQuery, kKey, kValue, kMask, kPastKey, kPastValue, kAttentionInputs };
constexpr const char* kNames[kAttentionInputs] = {"query", "key", "value", "mask", "past_key", "past_value"};

struct Kernel {
  Api api;
  int64_t heads, kv_heads;
  float scale;
  const attention::Loops* loops;
};

[[noreturn]] void refuse(size_t input, const Shape& shape, const std::string& expected) {
  std::string text;
  for (const int64_t size : shape) text += (text.empty() ? "" : ", ") + std::to_string(size);
  throw InvalidArgument(std::string(kName) + ": " + kNames[input] + ": has shape [" + text + "], expected " + expected);
}

std::unique_ptr<Kernel> create(const Api& api, const OrtKernelInfo* info) {
  auto kernel = std::make_unique<Kernel>(Kernel{api, required_attribute(api, info, "q_num_heads"), required_attribute(api, info, "kv_num_heads"), 0, &choose_attention_loops()});
  if (OrtStatus* status = api.attribute(info, "scale", &kernel->scale)) {
    api.release_status(status);
    throw InvalidLayer("scale: the attribute is missing, expected a float");
  }
  if (kernel->kv_heads < 1 || kernel->heads < 1 || kernel->heads % kernel->kv_heads) {
    throw InvalidLayer("q_num_heads: is " + std::to_string(kernel->heads) + ", expected a multiple of kv_num_heads = " +
                       std::to_string(kernel->kv_heads));
  }
  return kernel;
}

// The mask's strides; its axes are those of [batch, heads, rows, tokens] from the last on, each of that length or 1.
void read_mask(const Shape& shape, claq_attention_desc& a) {
  const std::string expected = "what broadcasts to [" + std::to_string(a.batch) + ", " + std::to_string(a.heads) + ", " +
                               std::to_string(a.rows) + ", " + std::to_string(a.tokens) + "] with all tokens";
  const int64_t full[] = {a.batch, a.heads, a.rows};
  int64_t* const strides[] = {&a.mask_batch, &a.mask_head, &a.mask_row};
  if (shape.empty() || shape.size() > 4 || shape.back() != a.tokens) refuse(kMask, shape, expected);
  int64_t stride = a.tokens;
  for (int axis = 2, from_end = 2; axis >= 0; --axis, ++from_end) {
    *strides[axis] = 0;
    if (static_cast<size_t>(from_end) > shape.size()) continue;
    const int64_t size = shape.data()[shape.size() - static_cast<size_t>(from_end)];
    if (size != full[axis] && size != 1) refuse(kMask, shape, expected);
    if (size != 1) *strides[axis] = stride;
    stride *= size;
  }
}

void compute(const Kernel& kernel, OrtKernelContext* context) {
  const Api& api = kernel.api;
  Shape shapes[kAttentionInputs];
  const float* data[kAttentionInputs];
  for (size_t i = 0; i < kAttentionInputs; ++i) {
    const OrtValue* value = nullptr;
    check(api.input(context, i, &value));
    shapes[i] = describe(api, value).shape;
    void* at = nullptr;
    check(api.tensor_data(value, &at));
    data[i] = static_cast<const float*>(at);
  }
  claq_attention_desc a{};
  a.struct_size = sizeof a;
  a.heads = kernel.heads;
  a.kv_heads = kernel.kv_heads;
  a.scale = kernel.scale;
  const Shape& query = shapes[kQuery];
  if (query.size() != 3 || query.back() % a.heads) refuse(kQuery, query, "[batch, tokens, a multiple of " + std::to_string(a.heads) + " heads]");
  a.batch = query.data()[0];
  a.rows = query.data()[1];
  a.key_size = query.back() / a.heads;
  const auto expect = [&](size_t input, const Shape& shape) {
    if (shapes[input] == shape) return;
    std::string text;
    for (const int64_t size : shape) text += (text.empty() ? "[" : ", ") + std::to_string(size);
    refuse(input, shapes[input], text + "]");
  };
  expect(kKey, {a.batch, a.rows, a.kv_heads * a.key_size});
  const Shape& value = shapes[kValue];
  if (value.size() != 3 || value.back() % a.kv_heads) refuse(kValue, value, "[batch, tokens, a multiple of " + std::to_string(a.kv_heads) + " heads]");
  a.value_size = value.back() / a.kv_heads;
  expect(kValue, {a.batch, a.rows, value.back()});
  if (shapes[kPastKey].size() != 4) refuse(kPastKey, shapes[kPastKey], "[batch, heads, past, size]");
  a.past = shapes[kPastKey].data()[2];
  a.tokens = a.past + a.rows;
  expect(kPastKey, {a.batch, a.kv_heads, a.past, a.key_size});
  expect(kPastValue, {a.batch, a.kv_heads, a.past, a.value_size});
  read_mask(shapes[kMask], a);
  a.query = data[kQuery];
  a.key = data[kKey];
  a.value = data[kValue];
  a.mask = data[kMask];
  a.past_key = data[kPastKey];
  a.past_value = data[kPastValue];
  float** const outputs[] = {&a.y, &a.present_key, &a.present_value};
  const Shape results[] = {{a.batch, a.rows, a.heads * a.value_size},
                           {a.batch, a.kv_heads, a.tokens, a.key_size},
                           {a.batch, a.kv_heads, a.tokens, a.value_size}};
  for (size_t i = 0; i < 3; ++i) {
    OrtValue* result = nullptr;
    void* at = nullptr;
    check(api.output(context, i, results[i].data(), results[i].size(), &result));
    check(api.tensor_data(result, &at));
    *outputs[i] = static_cast<float*>(at);
  }
  with_session_threads(api, context, [&](const Host& host) { attend(a, *kernel.loops, host); });
}

CustomOp make_op() {
  CustomOp op{};
  op.version = kOrtApiVersion;
  op.GetName = [](const CustomOp*) { return kName; };
  op.GetExecutionProviderType = [](const CustomOp*) { return "CPUExecutionProvider"; };
  op.GetInputTypeCount = [](const CustomOp*) { return static_cast<size_t>(kAttentionInputs); };
  op.GetInputType = [](const CustomOp*, size_t) -> int { return kFloat32; };
  op.GetOutputTypeCount = [](const CustomOp*) { return size_t{3}; };
  op.GetOutputType = [](const CustomOp*, size_t) -> int { return kFloat32; };
  describe_common(op);
  op.CreateKernelV2 = [](const CustomOp*, const OrtApi* table, const OrtKernelInfo* info, void** out) {
    const Api api(table);
    *out = nullptr;
    return guarded(api, [&] {
      try {
        *out = create(api, info).release();
      } catch (const InvalidLayer& error) {
        throw InvalidLayer(std::string(kName) + " node '" + node_name(api, info) + "': " + error.what());
      }
    });
  };
  op.KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
    const Kernel& self = *static_cast<const Kernel*>(kernel);
    return guarded(self.api, [&] { compute(self, context); });
  };
  op.KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  return op;
}

}  // namespace

const CustomOp& attention_op() {
  static const CustomOp op = make_op();
  return op;
}

}  // namespace claq::ort
