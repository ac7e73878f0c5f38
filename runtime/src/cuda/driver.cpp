#include "driver.h"

#include <dlfcn.h>

#include <string>

namespace claq::cuda {
namespace {

constexpr int kMultiprocessorCount = 16;  // CUdevice_attribute
constexpr int kCapabilityMajor = 75;
constexpr int kCapabilityMinor = 76;
constexpr int kMaxDynamicShared = 8;  // CUfunction_attribute
constexpr unsigned kSharedWithoutAsking = 48 * 1024;

template <class F>
void find(void* library, F& slot, const char* name) {
  slot = reinterpret_cast<F>(dlsym(library, name));
  if (!slot) throw Error(std::string("the CUDA driver has no ") + name + ": it is too old");
}

Address address(const void* pointer) { return reinterpret_cast<Address>(pointer); }

}  // namespace

bool Driver::present() { return dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL) != nullptr; }

const Driver& Driver::get() {
  static const Driver driver;  // a failure is tried again at the next call
  return driver;
}

Driver::Driver() {
  void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (!library) throw Error("no CUDA driver: libcuda.so.1 cannot be loaded");
  find(library, error_text_, "cuGetErrorString");
  find(library, init_, "cuInit");
  find(library, count_, "cuDeviceGetCount");
  find(library, device_, "cuDeviceGet");
  find(library, attribute_, "cuDeviceGetAttribute");
  find(library, current_, "cuCtxGetCurrent");
  find(library, context_device_, "cuCtxGetDevice");
  find(library, push_, "cuCtxPushCurrent_v2");
  find(library, pop_, "cuCtxPopCurrent_v2");
  context_id_ = reinterpret_cast<decltype(context_id_)>(dlsym(library, "cuCtxGetId"));  // since CUDA 12
  find(library, load_, "cuModuleLoadData");
  find(library, unload_, "cuModuleUnload");
  find(library, get_function_, "cuModuleGetFunction");
  find(library, set_attribute_, "cuFuncSetAttribute");
  find(library, to_host_, "cuMemcpyDtoH_v2");
  find(library, to_device_, "cuMemcpyHtoD_v2");
  find(library, synchronize_, "cuStreamSynchronize");
  find(library, copy_, "cuMemcpyDtoDAsync_v2");
  find(library, allocate_, "cuMemAlloc_v2");
  find(library, release_, "cuMemFree_v2");
  find(library, launch_, "cuLaunchKernel");
  check(init_(0), "cuInit");
}

void Driver::check(int result, const char* call) const {
  if (result == 0) return;
  const char* text = nullptr;
  error_text_(result, &text);
  throw Error(std::string(call) + ": " + (text ? text : "CUDA error") + " (" + std::to_string(result) + ")");
}

int Driver::device_count() const {
  int count = 0;
  check(count_(&count), "cuDeviceGetCount");
  return count;
}

int Driver::capability(int device) const {
  int handle = 0, major = 0, minor = 0;
  check(device_(&handle, device), "cuDeviceGet");
  check(attribute_(&major, kCapabilityMajor, handle), "cuDeviceGetAttribute");
  check(attribute_(&minor, kCapabilityMinor, handle), "cuDeviceGetAttribute");
  return 10 * major + minor;
}

int Driver::multiprocessors(int device) const {
  int handle = 0, count = 0;
  check(device_(&handle, device), "cuDeviceGet");
  check(attribute_(&count, kMultiprocessorCount, handle), "cuDeviceGetAttribute");
  return count;
}

Context Driver::current() const {
  Context context = nullptr;
  check(current_(&context), "cuCtxGetCurrent");
  if (!context) throw Error("this thread has no CUDA context");
  return context;
}

uint64_t Driver::id(Context context) const {
  if (!context_id_) return address(context);
  unsigned long long id = 0;
  check(context_id_(context, &id), "cuCtxGetId");
  return id;
}

bool Driver::push(Context context) const noexcept { return push_(context) == 0; }

void Driver::pop() const noexcept {
  Context context = nullptr;
  pop_(&context);
}

int Driver::current_device() const {
  current();
  int device = 0;
  check(context_device_(&device), "cuCtxGetDevice");
  return device;
}

Module Driver::load(const void* image) const {
  Module module = nullptr;
  check(load_(&module, image), "cuModuleLoadData");
  return module;
}

void Driver::unload(Module module) const noexcept { unload_(module); }

Function Driver::function(Module module, const char* entry, unsigned shared) const {
  Function found = nullptr;
  check(get_function_(&found, module, entry), "cuModuleGetFunction");
  if (shared > kSharedWithoutAsking) {
    check(set_attribute_(found, kMaxDynamicShared, static_cast<int>(shared)), "cuFuncSetAttribute");
  }
  return found;
}

void Driver::to_host(void* host, const void* device, size_t bytes) const {
  if (bytes) check(to_host_(host, address(device), bytes), "cuMemcpyDtoH");
}

void Driver::to_device(void* device, const void* host, size_t bytes) const {
  if (!bytes) return;
  check(to_device_(address(device), host, bytes), "cuMemcpyHtoD");
  // From pageable memory it returns when the bytes are staged, and a stream of ONNX Runtime does not wait for what carries them on.
  check(synchronize_(nullptr), "cuStreamSynchronize");
}

void Driver::copy(void* to, const void* from, size_t bytes, Stream stream) const {
  check(copy_(address(to), address(from), bytes, stream), "cuMemcpyDtoDAsync");
}

void* Driver::allocate(size_t bytes) const {
  Address memory = 0;
  check(allocate_(&memory, bytes), "cuMemAlloc");
  return reinterpret_cast<void*>(memory);
}

void Driver::release(void* memory) const noexcept { release_(address(memory)); }

void Driver::launch(Function function, const unsigned (&grid)[3], unsigned threads, unsigned shared, Stream stream, void** parameters) const {
  check(launch_(function, grid[0], grid[1], grid[2], threads, 1, 1, shared, stream, parameters, nullptr), "cuLaunchKernel");
}

}  // namespace claq::cuda
