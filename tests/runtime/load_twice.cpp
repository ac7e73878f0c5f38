// A C++ program that has libclaq in the process more than once, as a host with plug-ins may (test_load_twice.py):
//
//   load_twice MODEL LIBCLAQ COPY_OF_LIBCLAQ INPUT ROWS FEATURES
//
// INPUT holds ROWS x FEATURES float32. The library is opened twice by one path and once by another, its threads are started,
// and sessions of ONNX Runtime register both files, one of them repeatedly. All run at the same time, sessions and handles
// are given back in an order that a careless host might choose, and what is left runs on. Every result must have the same
// bits; the first is written to standard output.
#include <dlfcn.h>

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <thread>
#include <vector>

#include "ort_c_api.h"

static const OrtApi* api;

// Entries of ONNX Runtime's table that the example does without.
constexpr int kReleaseEnv = 92, kReleaseSession = 95, kReleaseSessionOptions = 100;

static void fail(const char* what) {
  std::fprintf(stderr, "%s\n", what);
  std::exit(1);
}

template <typename... Args>
static void* status_of(int slot, Args... args) {
  return reinterpret_cast<void* (*)(Args...)>(api->slots[slot])(args...);
}

static const char* message_of(void* status) {
  return reinterpret_cast<const char* (*)(void*)>(api->slots[kGetErrorMessage])(status);
}

static void release(int slot, void* object) { reinterpret_cast<void (*)(void*)>(api->slots[slot])(object); }

template <typename... Args>
static void call(int slot, Args... args) {
  if (void* status = status_of(slot, args...)) {
    fail(message_of(status));
  }
}

struct Input {
  std::vector<float> values;
  int64_t rows, features;
};

// A session that has registered some libraries; `handles` gets what ONNX Runtime opened. ONNX Runtime may refuse to have a
// domain twice, with a message: then null, if there was more than one library.
static void* make_session(void* env, const char* model, const std::vector<const char*>& libraries, std::vector<void*>& handles) {
  void *options = nullptr, *session = nullptr;
  call(kCreateSessionOptions, &options);
  call(kSetIntraOpNumThreads, options, 2);
  for (size_t i = 0; i < libraries.size(); ++i) {
    void* handle = nullptr;
    void* status = status_of(kRegisterCustomOpsLibrary, options, libraries[i], &handle);
    if (status && i == 0) fail(message_of(status));
    if (status) release(kReleaseStatus, status);
    if (handle) handles.push_back(handle);
  }
  void* status = status_of(kCreateSession, env, model, options, &session);
  if (status && (libraries.size() == 1 || !*message_of(status))) fail(message_of(status));
  if (status) release(kReleaseStatus, status);
  release(kReleaseSessionOptions, options);
  return session;
}

static std::vector<float> run(void* session, const Input& input) {
  void *allocator = nullptr, *x = nullptr, *y = nullptr, *memory = nullptr, *info = nullptr;
  call(kGetAllocatorWithDefaultOptions, &allocator);
  const int64_t shape[3] = {1, input.rows, input.features};
  call(kCreateTensorAsOrtValue, allocator, static_cast<const int64_t*>(shape), size_t{3}, static_cast<int>(kFloat), &x);
  call(kGetTensorMutableData, x, &memory);
  std::memcpy(memory, input.values.data(), input.values.size() * sizeof(float));
  const char *in = "x", *out = "y";
  call(kRun, session, static_cast<const void*>(nullptr), &in, static_cast<void* const*>(&x), size_t{1}, &out, size_t{1}, &y);
  int64_t found[3];
  call(kGetTensorTypeAndShape, y, &info);
  call(kGetDimensions, static_cast<const void*>(info), static_cast<int64_t*>(found), size_t{3});
  call(kGetTensorMutableData, y, &memory);
  const auto* data = static_cast<const float*>(memory);
  std::vector<float> result(data, data + found[0] * found[1] * found[2]);
  release(kReleaseTensorTypeAndShapeInfo, info);
  release(kReleaseValue, x);
  release(kReleaseValue, y);
  return result;
}

static void* open(const char* path) {
  void* handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (!handle) fail(dlerror());
  return handle;
}

using ParallelFor = void (*)(void*, void (*)(void*, size_t), size_t, void*);

static void start_threads(void* handle) {
  const auto parallel_for = reinterpret_cast<ParallelFor>(dlsym(handle, "claq_pool_parallel_for"));
  std::atomic<size_t> count{0};
  parallel_for(reinterpret_cast<void*>(uintptr_t{3}),
               [](void* data, size_t) { ++*static_cast<std::atomic<size_t>*>(data); }, 1000, &count);
  if (count != 1000) fail("the library's threads did not do every task once");
}

int main(int argc, char** argv) {
  if (argc != 7) fail("usage: load_twice MODEL LIBCLAQ COPY INPUT ROWS FEATURES");
  const char *model = argv[1], *library = argv[2], *copy = argv[3];
  Input input{{}, std::atoll(argv[5]), std::atoll(argv[6])};
  input.values.resize(input.rows * input.features);
  std::ifstream(argv[4], std::ios::binary)
      .read(reinterpret_cast<char*>(input.values.data()), static_cast<std::streamsize>(input.values.size() * sizeof(float)));

  void* handles[] = {open(library), open(library), open(copy)};
  void* entries[3];
  for (int i = 0; i < 3; ++i) {
    entries[i] = dlsym(handles[i], "claq_version");
    start_threads(handles[i]);
  }
  if (entries[0] != entries[1]) fail("one file is in memory twice");
  if (entries[0] == entries[2]) fail("the copy is not a library of its own; the test tests nothing");

  api = OrtGetApiBase()->GetApi(17);
  void* env = nullptr;
  call(kCreateEnv, 3, "load_twice", &env);
  std::vector<void*> opened;
  std::vector<void*> sessions;
  for (const auto& libraries : std::vector<std::vector<const char*>>{{library}, {library}, {copy}, {library, library}}) {
    if (void* session = make_session(env, model, libraries, opened)) sessions.push_back(session);
  }
  if (sessions.size() < 3) fail("a session that registers the library once was refused");
  const std::vector<float> expected = run(sessions[0], input);
  std::fwrite(expected.data(), sizeof(float), expected.size(), stdout);

  std::atomic<int> wrong{0};
  const auto check = [&](void* session) {
    const std::vector<float> got = run(session, input);
    if (got.size() != expected.size() || std::memcmp(got.data(), expected.data(), got.size() * sizeof(float))) ++wrong;
  };
  std::vector<std::thread> threads;
  for (void* session : sessions) {
    for (int i = 0; i < 2; ++i) threads.emplace_back([&, session] { for (int k = 0; k < 50; ++k) check(session); });
  }
  for (std::thread& thread : threads) thread.join();

  // The first session and the host's own handles go; the others run on.
  release(kReleaseSession, sessions[0]);
  for (void* handle : handles) dlclose(handle);
  for (size_t i = 1; i < sessions.size(); ++i) check(sessions[i]);
  for (size_t i = 1; i < sessions.size(); ++i) release(kReleaseSession, sessions[i]);
  // Everything that was opened is closed, while the library's threads sleep, and then it is wanted again.
  for (void* handle : opened) dlclose(handle);
  opened.clear();
  void* again = make_session(env, model, {library}, opened);
  check(again);
  void* handle = open(library);
  start_threads(handle);
  release(kReleaseSession, again);
  release(kReleaseEnv, env);
  if (wrong) fail("a result differs from the first");
  return 0;
}
