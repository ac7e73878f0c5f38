// A stand-in for libcuda.so.1 on a machine without a GPU: device memory is host memory, and a launch calls the function
// that the test has set. Images are ELF magic followed by the kernel's name, as the test's packages hold them.
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>

namespace {

using Launched = void (*)(const char* name, const unsigned* grid, unsigned threads, unsigned shared, void* stream, void** parameters);

Launched launched = nullptr;
int devices = 1;
int has_context = 1;
int refused_memory = 0;
int started = 0;

int capability() {
  const char* text = std::getenv("FAKE_CAPABILITY");
  return text ? std::atoi(text) : 80;
}

}  // namespace

extern "C" {

void fake_on_launch(Launched function) { launched = function; }
void fake_set_devices(int count) { devices = count; }
void fake_set_context(int present) { has_context = present; }
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
  *context = reinterpret_cast<void*>(static_cast<uintptr_t>(has_context));
  return 0;
}
int cuCtxGetDevice(int* device) {
  *device = 0;
  return 0;
}
int cuModuleLoadData(void** module, const void* image) {
  if (std::memcmp(image, "\177ELF", 4) != 0) return 200;  // CUDA_ERROR_INVALID_IMAGE
  *module = new std::string(static_cast<const char*>(image) + 4);
  return 0;
}
int cuModuleGetFunction(void** function, void* module, const char* entry) {
  *function = module;
  return std::strncmp(entry, "claq_", 5) == 0 ? 0 : 500;  // CUDA_ERROR_NOT_FOUND
}
int cuModuleUnload(void* module) {
  delete static_cast<std::string*>(module);
  return 0;
}
int cuStreamSynchronize(void*) { return 0; }
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
  return 0;
}
int cuMemFree_v2(uint64_t memory) {
  std::free(reinterpret_cast<void*>(memory));
  return 0;
}
int cuLaunchKernel(void* function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned, unsigned, unsigned shared,
                   void* stream, void** parameters, void**) {
  const unsigned grid[3] = {x, y, z};
  if (!launched || x == 0 || y == 0 || z == 0) return 1;  // CUDA_ERROR_INVALID_VALUE
  launched(static_cast<std::string*>(function)->c_str(), grid, threads, shared, stream, parameters);
  return 0;
}

}  // extern "C"
