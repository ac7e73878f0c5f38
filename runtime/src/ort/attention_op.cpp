// ClaqAttention and ClaqCachedAttention on the CPU; the latter has a past as well, and gives the longer cache.
#include "../attention/attention.h"

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "operator.h"

namespace claq::ort {
namespace {

enum Input : size_t { kQuery, kKey, kValue, kMask, kUncachedInputs, kPastKey = kUncachedInputs, kPastValue, kCachedInputs };
constexpr const char* kNames[kCachedInputs] = {"query", "key", "value", "mask", "past_key", "past_value"};

struct AttentionOp : CustomOp {
  bool cached;
  int cache_type;
};

const AttentionOp& own(const CustomOp* op) { return *static_cast<const AttentionOp*>(op); }
const char* name_of(bool cached) { return cached ? "ClaqCachedAttention" : "ClaqAttention"; }

struct Kernel {
  Api api;
  bool cached;
  int64_t heads, kv_heads;
  float scale;
  const attention::Loops* loops;
};

std::string text_of(const Shape& shape) {
  std::string text;
  for (const int64_t size : shape) text += (text.empty() ? "" : ", ") + std::to_string(size);
  return "[" + text + "]";
}

[[noreturn]] void refuse(bool cached, size_t input, const Shape& shape, const std::string& expected) {
  throw InvalidArgument(std::string(name_of(cached)) + ": " + kNames[input] + ": has shape " + text_of(shape) + ", expected " + expected);
}

std::unique_ptr<Kernel> create(const Api& api, const OrtKernelInfo* info, bool cached) {
  const char* const heads_name = cached ? "q_num_heads" : "num_heads";
  const int64_t heads = required_attribute(api, info, heads_name);
  const int64_t kv_heads = cached ? required_attribute(api, info, "kv_num_heads") : heads;
  auto kernel = std::make_unique<Kernel>(Kernel{api, cached, heads, kv_heads, 0, &choose_attention_loops()});
  if (OrtStatus* status = api.attribute(info, "scale", &kernel->scale)) {
    api.release_status(status);
    throw InvalidLayer("scale: the attribute is missing, expected a float");
  }
  if (heads < 1 || heads > kLargestAttentionSize) {
    throw InvalidLayer(std::string(heads_name) + ": is " + std::to_string(heads) + ", expected 1 to " + std::to_string(kLargestAttentionSize));
  }
  if (kv_heads < 1 || heads % kv_heads) {
    throw InvalidLayer("q_num_heads: is " + std::to_string(heads) + ", expected a multiple of kv_num_heads = " + std::to_string(kv_heads));
  }
  return kernel;
}

// The mask and its strides; its axes are those of [batch, heads, rows, tokens] from the last on, each of that length or 1. `expanded`
// holds it where it is not used as it is.
void read_mask(bool cached, const Shape& shape, const float* data, claq_attention_desc& a, std::vector<float>& expanded) {
  const Shape whole{a.batch, a.heads, a.rows, a.tokens};
  const int64_t* const full = whole.data();
  int64_t* const strides[] = {&a.mask_batch, &a.mask_head, &a.mask_row};
  const auto wrong = [&] { refuse(cached, kMask, shape, "what broadcasts to " + text_of(whole)); };
  if (shape.empty() || shape.size() > 4 || (shape.back() != a.tokens && shape.back() != 1)) wrong();
  a.mask = data;
  int64_t stride = a.tokens;
  for (int axis = 2, from_end = 2; axis >= 0; --axis, ++from_end) {
    *strides[axis] = 0;
    if (static_cast<size_t>(from_end) > shape.size()) continue;
    const int64_t size = shape.data()[shape.size() - static_cast<size_t>(from_end)];
    if (size != full[axis] && size != 1) wrong();
    if (size != 1) *strides[axis] = stride;
    stride *= size;
  }
  if (shape.back() == a.tokens) return;
  // One number for all tokens. Zeros change nothing; a large one does, since scores beside it are rounded, as in the function.
  a.mask = nullptr;
  int64_t count = 1;
  for (size_t i = 0; i < shape.size(); ++i) count *= shape.data()[i];
  if (std::all_of(data, data + count, [](float value) { return value == 0; })) return;
  expanded.reserve(static_cast<size_t>(count * a.tokens));
  for (int64_t i = 0; i < count; ++i) expanded.insert(expanded.end(), static_cast<size_t>(a.tokens), data[i]);
  a.mask = expanded.data();
}

void compute(const Kernel& kernel, OrtKernelContext* context) {
  const Api& api = kernel.api;
  const bool cached = kernel.cached;
  Shape shapes[kCachedInputs];
  const void* data[kCachedInputs] = {};
  claq_dtype cache_type = CLAQ_FLOAT32;
  for (size_t i = 0; i < (cached ? kCachedInputs : kUncachedInputs); ++i) {
    const OrtValue* value = nullptr;
    check(api.input(context, i, &value));
    const TensorInfo described = describe(api, value, kNames[i], name_of(cached));
    shapes[i] = described.shape;
    if (i == kPastKey) cache_type = static_cast<claq_dtype>(described.type);
    void* at = nullptr;
    check(api.tensor_data(value, &at));
    data[i] = at;
  }
  claq_attention_desc a{};
  a.struct_size = sizeof a;
  a.heads = kernel.heads;
  a.kv_heads = kernel.kv_heads;
  a.scale = kernel.scale;
  const auto by_heads = [&](size_t input, int64_t heads) {
    const Shape& shape = shapes[input];
    if (shape.size() != 3 || shape.back() % heads) {
      refuse(cached, input, shape, "[batch, tokens, a multiple of " + std::to_string(heads) + " heads]");
    }
    return shape.back() / heads;
  };
  const auto expect = [&](size_t input, const Shape& shape) {
    if (shapes[input] != shape) refuse(cached, input, shapes[input], text_of(shape));
  };
  a.key_size = by_heads(kQuery, a.heads);
  a.batch = shapes[kQuery].data()[0];
  a.rows = shapes[kQuery].data()[1];
  by_heads(kKey, a.kv_heads);
  const int64_t fresh = cached ? a.rows : shapes[kKey].data()[1];
  expect(kKey, {a.batch, fresh, a.kv_heads * a.key_size});
  a.value_size = by_heads(kValue, a.kv_heads);
  expect(kValue, {a.batch, fresh, a.kv_heads * a.value_size});
  if (cached) {
    if (shapes[kPastKey].size() != 4) refuse(cached, kPastKey, shapes[kPastKey], "[batch, heads, past, size]");
    a.past = shapes[kPastKey].data()[2];
    expect(kPastKey, {a.batch, a.kv_heads, a.past, a.key_size});
    expect(kPastValue, {a.batch, a.kv_heads, a.past, a.value_size});
    // A mask over no more tokens than the past has room for: the past is a buffer, and the new ones go into it.
    const int64_t seen = shapes[kMask].empty() ? 0 : shapes[kMask].back();
    if (fresh > 0 && fresh <= seen && seen <= a.past) {
      a.capacity = a.past;
      a.past = seen - fresh;
    }
  }
  a.tokens = static_cast<int64_t>(static_cast<uint64_t>(a.past) + static_cast<uint64_t>(fresh));  // of no data: may be negative then
  try {
    check_sizes(a);  // before outputs and the mask are made in these sizes
  } catch (const InvalidArgument& error) {
    throw InvalidArgument(std::string(name_of(cached)) + ": " + error.what());
  }
  const auto floats = [&](size_t input) { return static_cast<const float*>(data[input]); };
  std::vector<float> expanded;
  read_mask(cached, shapes[kMask], floats(kMask), a, expanded);
  a.query = floats(kQuery);
  a.key = floats(kKey);
  a.value = floats(kValue);
  a.cache_dtype = cache_type;
  a.past_key = data[kPastKey];
  a.past_value = data[kPastValue];
  const auto output = [&](size_t index, const Shape& shape) {
    OrtValue* result = nullptr;
    void* at = nullptr;
    check(api.output(context, index, shape.data(), shape.size(), &result));
    check(api.tensor_data(result, &at));
    return at;
  };
  a.y = static_cast<float*>(output(0, {a.batch, a.rows, a.heads * a.value_size}));
  if (cached) {
    const int64_t room = a.capacity ? a.capacity : a.tokens;
    a.present_key = output(1, {a.batch, a.kv_heads, room, a.key_size});
    a.present_value = output(2, {a.batch, a.kv_heads, room, a.value_size});
    // Whoever forgot the new tokens in the mask has bound no such buffers.
    if (a.capacity && (a.present_key != a.past_key || a.present_value != a.past_value)) {
      const Shape whole{a.batch, a.heads, a.rows, a.capacity + fresh};
      refuse(cached, kMask, shapes[kMask],
             "what broadcasts to " + text_of(whole) + ", or present_key and present_value bound to the memory of past_key and past_value");
    }
  }
  with_session_threads(api, context, [&](const Host& host) { attend(a, *kernel.loops, host); });
}

AttentionOp make_op(bool cached, int cache_type) {
  AttentionOp op{};
  op.cached = cached;
  op.cache_type = cache_type;
  op.version = kOrtApiVersion;
  op.GetName = [](const CustomOp* self) { return name_of(own(self).cached); };
  op.GetExecutionProviderType = [](const CustomOp*) { return "CPUExecutionProvider"; };
  op.GetInputTypeCount = [](const CustomOp* self) -> size_t { return own(self).cached ? kCachedInputs : kUncachedInputs; };
  op.GetInputType = [](const CustomOp* self, size_t index) { return index >= kPastKey ? own(self).cache_type : kFloat32; };
  op.GetOutputTypeCount = [](const CustomOp* self) -> size_t { return own(self).cached ? 3 : 1; };
  op.GetOutputType = [](const CustomOp* self, size_t index) { return index > 0 ? own(self).cache_type : kFloat32; };
  describe_common(op);
  op.CreateKernelV2 = [](const CustomOp* self, const OrtApi* table, const OrtKernelInfo* info, void** out) {
    const Api api(table);
    const bool with_cache = own(self).cached;
    return make_kernel(api, info, name_of(with_cache), out, [&] { return create(api, info, with_cache).release(); });
  };
  op.KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
    const Kernel& self = *static_cast<const Kernel*>(kernel);
    return guarded(self.api, [&] { compute(self, context); });
  };
  op.KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  return op;
}

}  // namespace

const std::array<const CustomOp*, 3>& attention_ops() {
  static const AttentionOp plain = make_op(false, kFloat32), cached = make_op(true, kFloat32), half_cached = make_op(true, kFloat16);
  static const std::array<const CustomOp*, 3> ops{&plain, &cached, &half_cached};
  return ops;
}

}  // namespace claq::ort
