// A language model exported by claq in a C++ program: ONNX Runtime and libclaq, no Python. Greedy, one sequence.
//
//   make -C examples/cpp && examples/cpp/generate model.onnx libclaq.so 32 504 253 28 ...
//
// prints the new tokens' ids; turning text into ids is the tokenizer's business (see README.md). An empty library name
// ("") runs the same file on ONNX Runtime's standard operators.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <numeric>
#include <string>
#include <vector>

#include "ort_c_api.h"

using Value = void*;

static const OrtApi* api;

template <typename... Args>
void call(Slot slot, Args... args) {
  void* status = reinterpret_cast<void* (*)(Args...)>(api->slots[slot])(args...);
  if (!status) return;
  std::fprintf(stderr, "onnxruntime: %s\n", reinterpret_cast<const char* (*)(void*)>(api->slots[kGetErrorMessage])(status));
  std::exit(1);
}

void release(Slot slot, void* object) { reinterpret_cast<void (*)(void*)>(api->slots[slot])(object); }

template <typename T>
Value tensor(void* allocator, const std::vector<int64_t>& shape, int type, const std::vector<T>& data) {
  Value value = nullptr;
  void* memory = nullptr;
  call(kCreateTensorAsOrtValue, allocator, shape.data(), shape.size(), type, &value);
  call(kGetTensorMutableData, value, &memory);
  std::copy(data.begin(), data.end(), static_cast<T*>(memory));
  return value;
}

// Whether the file says so of itself; with the headers of a release ask for the model's metadata instead.
bool takes_buffers(const char* path) {
  std::ifstream file(path, std::ios::binary);
  const std::string content{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  return content.find("claq.cache_buffers") != std::string::npos;
}

int main(int argc, char** argv) {
  if (argc < 5) {
    std::fprintf(stderr, "usage: %s MODEL LIBCLAQ NEW_TOKENS TOKEN...\n", argv[0]);
    return 2;
  }
  api = OrtGetApiBase()->GetApi(17);
  void *env = nullptr, *options = nullptr, *session = nullptr, *allocator = nullptr, *library = nullptr;
  call(kCreateEnv, 3, "generate", &env);
  call(kCreateSessionOptions, &options);
  call(kSetIntraOpNumThreads, options, 2);
  if (*argv[2]) call(kRegisterCustomOpsLibrary, options, static_cast<const char*>(argv[2]), &library);
  call(kCreateSession, env, static_cast<const char*>(argv[1]), options, &session);
  call(kGetAllocatorWithDefaultOptions, &allocator);

  std::vector<int64_t> tokens;
  for (int i = 4; i < argc; ++i) tokens.push_back(std::atoll(argv[i]));
  // With libclaq the cache stays in place: buffers with room for all tokens are inputs and outputs. Else each run makes a longer one.
  const bool in_place = *argv[2] && takes_buffers(argv[1]);
  const int64_t room = in_place ? static_cast<int64_t>(tokens.size()) + std::atoll(argv[3]) : 0;

  // Inputs are input_ids, attention_mask, perhaps position_ids, and the cache; outputs logits and the cache with the new tokens.
  size_t count = 0;
  call(kSessionGetInputCount, session, &count);
  std::vector<const char*> inputs;
  std::vector<std::string> present;
  std::vector<Value> cache;
  const std::string past = "past_key_values";
  for (size_t i = 0; i < count; ++i) {
    char* name = nullptr;
    call(kSessionGetInputName, session, i, allocator, &name);
    inputs.push_back(name);
    if (std::string(name).compare(0, past.size(), past)) continue;
    void* type = nullptr;
    const void* info = nullptr;
    int64_t shape[4];
    int element = 0;  // float32, or float16 of a file made with --cache-dtype float16
    call(kSessionGetInputTypeInfo, session, i, &type);
    call(kCastTypeInfoToTensorInfo, type, &info);
    call(kGetDimensions, info, shape, size_t{4});
    call(kGetTensorElementType, info, &element);
    present.push_back("present" + std::string(name).substr(past.size()));
    cache.push_back(tensor<float>(allocator, {1, shape[1], room, shape[3]}, element, {}));
  }
  std::vector<const char*> outputs{"logits"};
  for (const auto& name : present) outputs.push_back(name.c_str());

  int64_t length = 0;
  for (int step = 0; step < std::atoi(argv[3]); ++step) {
    const int64_t added = static_cast<int64_t>(tokens.size());
    std::vector<int64_t> mask(length + added, 1), positions(added);
    std::iota(positions.begin(), positions.end(), length);
    std::vector<Value> feed, results(1, nullptr);
    size_t used = 0;
    for (const std::string name : inputs) {
      if (name == "input_ids") feed.push_back(tensor(allocator, {1, added}, kInt64, tokens));
      else if (name == "attention_mask") feed.push_back(tensor(allocator, {1, length + added}, kInt64, mask));
      else if (name == "position_ids") feed.push_back(tensor(allocator, {1, added}, kInt64, positions));
      else feed.push_back(cache[used++]);
    }
    if (in_place) results.insert(results.end(), cache.begin(), cache.end());
    results.resize(outputs.size(), nullptr);
    call(kRun, session, static_cast<const void*>(nullptr), inputs.data(), static_cast<const Value*>(feed.data()), feed.size(),
         outputs.data(), outputs.size(), results.data());
    for (Value value : feed) {
      if (!in_place || std::find(cache.begin(), cache.end(), value) == cache.end()) release(kReleaseValue, value);
    }
    cache.assign(results.begin() + 1, results.end());

    float* logits = nullptr;
    void* info = nullptr;
    int64_t shape[3];
    call(kGetTensorMutableData, results[0], reinterpret_cast<void**>(&logits));
    call(kGetTensorTypeAndShape, results[0], &info);
    call(kGetDimensions, static_cast<const void*>(info), shape, size_t{3});
    const float* last = logits + (shape[1] - 1) * shape[2];
    const int64_t next = std::max_element(last, last + shape[2]) - last;
    release(kReleaseTensorTypeAndShapeInfo, info);
    release(kReleaseValue, results[0]);
    std::printf("%lld%s", static_cast<long long>(next), step + 1 < std::atoi(argv[3]) ? " " : "\n");
    std::fflush(stdout);
    length += added;
    tokens = {next};
  }
  return 0;
}
