// A stand-in for libcuda.so.1 on a machine without a GPU: device memory is host memory, and a launch calls the function
// that the test has set. Images are ELF magic followed by the kernel's name, as the test's packages hold them. Built with
// BEFORE_CUDA_12 it has no numbers of contexts.
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <vector>

namespace {

using Launched = void (*)(const char* name, const unsigned* grid, unsigned threads, unsigned shared, void* stream, void** parameters);

Launched launched = nullptr;
int devices = 1;
uintptr_t current = 1;  // address of the context
std::vector<uintptr_t> covered;  // by those that were pushed
uintptr_t ended = 0;
int renewals = 0;
std::map<uint64_t, uintptr_t> owners;  // the context of each piece of memory
int refused_memory = 0;
int started = 0;
int modules = 0;
int loads = 0;
int waits = 0;

int capability() {
  const char* text = std::getenv("FAKE_CAPABILITY");
  return text ? std::atoi(text) : 80;
}

}  // namespace

extern "C" {

void fake_on_launch(Launched function) { launched = function; }
void fake_set_devices(int count) { devices = count; }
void fake_set_context(int address) { current = static_cast<uintptr_t>(address); }
int fake_context() { return static_cast<int>(current); }
// Another context lies where one was destroyed.
void fake_renew_context() { ++renewals; }
void fake_end_context(int address) { ended = static_cast<uintptr_t>(address); }
int fake_memory_held() { return static_cast<int>(owners.size()); }
int fake_modules() { return modules; }
int fake_loads() { return loads; }
int fake_waits() { return waits; }
void fake_refuse_memory(int refuse) { refused_memory = refuse; }

int fake_started() { return started; }
int cuInit(unsigned) {
  started = 1;
  return 0;
}
int cuGetErrorString(int, const char** text) {
  *text = "the fake driver refuses";
  return 0;
}
int cuDeviceGetCount(int* count) {
  *count = devices;
  return 0;
}
int cuDeviceGet(int* device, int ordinal) {
  *device = ordinal;
  return 0;
}
int cuDeviceGetAttribute(int* value, int attribute, int) {
  *value = attribute == 75 ? capability() / 10 : attribute == 76 ? capability() % 10 : attribute == 16 ? 4 : 0;
  return 0;
}
int cuCtxGetCurrent(void** context) {
  *context = reinterpret_cast<void*>(current);
  return 0;
}
#ifndef BEFORE_CUDA_12
int cuCtxGetId(void* context, unsigned long long* id) {
  *id = 1000ull * static_cast<unsigned>(renewals) + reinterpret_cast<uintptr_t>(context);
  return 0;
}
#endif
int cuCtxPushCurrent_v2(void* context) {
  if (!context || reinterpret_cast<uintptr_t>(context) == ended) return 709;  // CUDA_ERROR_CONTEXT_IS_DESTROYED
  covered.push_back(current);
  current = reinterpret_cast<uintptr_t>(context);
  return 0;
}
int cuCtxPopCurrent_v2(void** context) {
  if (covered.empty()) return 201;  // CUDA_ERROR_INVALID_CONTEXT
  *context = reinterpret_cast<void*>(current);
  current = covered.back();
  covered.pop_back();
  return 0;
}
int cuCtxGetDevice(int* device) {
  *device = 0;
  return 0;
}
int cuModuleLoadData(void** module, const void* image) {
  if (std::memcmp(image, "\177ELF", 4) != 0) return 200;  // CUDA_ERROR_INVALID_IMAGE
  *module = new std::string(static_cast<const char*>(image) + 4);
  ++modules;
  ++loads;
  return 0;
}
int cuModuleGetFunction(void** function, void* module, const char* entry) {
  *function = module;
  return std::strncmp(entry, "claq_", 5) == 0 ? 0 : 500;  // CUDA_ERROR_NOT_FOUND
}
int cuModuleUnload(void* module) {
  delete static_cast<std::string*>(module);
  --modules;
  return 0;
}
int cuStreamSynchronize(void*) {
  ++waits;
  return 0;
}
int cuFuncSetAttribute(void*, int, int) { return 0; }
int cuMemcpyDtoH_v2(void* to, uint64_t from, size_t bytes) {
  std::memcpy(to, reinterpret_cast<const void*>(from), bytes);
  return 0;
}
int cuMemcpyHtoD_v2(uint64_t to, const void* from, size_t bytes) {
  std::memcpy(reinterpret_cast<void*>(to), from, bytes);
  return 0;
}
int cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t bytes, void*) {
  std::memmove(reinterpret_cast<void*>(to), reinterpret_cast<const void*>(from), bytes);
  return 0;
}
int cuMemAlloc_v2(uint64_t* memory, size_t bytes) {
  if (refused_memory) return 2;  // CUDA_ERROR_OUT_OF_MEMORY
  *memory = reinterpret_cast<uint64_t>(std::aligned_alloc(256, (bytes + 255) / 256 * 256));
  owners[*memory] = current;
  return 0;
}
int cuMemFree_v2(uint64_t memory) {
  const auto owner = owners.find(memory);
  if (owner == owners.end() || owner->second != current) return 201;  // CUDA_ERROR_INVALID_CONTEXT
  owners.erase(owner);
  std::free(reinterpret_cast<void*>(memory));
  return 0;
}
int cuLaunchKernel(void* function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned, unsigned, unsigned shared,
                   void* stream, void** parameters, void**) {
  const unsigned grid[3] = {x, y, z};
  if (!launched || x == 0 || y == 0 || z == 0 || x > INT32_MAX || y > 65535 || z > 65535) return 1;  // CUDA_ERROR_INVALID_VALUE
  launched(static_cast<std::string*>(function)->c_str(), grid, threads, shared, stream, parameters);
  return 0;
}

}  // extern "C"
