// The CUDA driver, looked up at run time: libclaq links to nothing of CUDA and loads where there is none.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>

namespace claq::cuda {

using Context = void*;   // CUcontext
using Module = void*;    // CUmodule
using Function = void*;  // CUfunction
using Stream = void*;    // CUstream, the same as cudaStream_t
using Address = uint64_t;  // CUdeviceptr

// What the driver refused or what is missing, in words.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

class Driver {
 public:
  // Whether the driver's library is there; it is not started by that.
  static bool present();
  // The driver of this machine, initialised. Throws Error with the reason where there is none.
  static const Driver& get();

  int device_count() const;
  // 80 for compute capability 8.0.
  int capability(int device) const;
  int multiprocessors(int device) const;

  // The calling thread's context. Throws Error if it has none.
  Context current() const;
  int current_device() const;
  // A number that no other context of this process gets, also after this one is gone. Drivers before CUDA 12 have none: there
  // it is the address, which a later context may have again.
  uint64_t id(Context context) const;
  // Makes a context the thread's until pop; false if the driver refuses, as for one that is gone.
  bool push(Context context) const noexcept;
  void pop() const noexcept;

  Module load(const void* image) const;
  void unload(Module module) const noexcept;
  // Throws Error if the device cannot give a block `shared` bytes.
  Function function(Module module, const char* entry, unsigned shared) const;

  void to_host(void* host, const void* device, size_t bytes) const;
  void to_device(void* device, const void* host, size_t bytes) const;
  void copy(void* to, const void* from, size_t bytes, Stream stream) const;  // on the device, asynchronous
  void* allocate(size_t bytes) const;
  void release(void* memory) const noexcept;

  void launch(Function function, const unsigned (&grid)[3], unsigned threads, unsigned shared, Stream stream, void** parameters) const;

 private:
  Driver();
  void check(int result, const char* call) const;

  int (*init_)(unsigned);
  int (*count_)(int*);
  int (*device_)(int*, int);
  int (*attribute_)(int*, int, int);
  int (*current_)(Context*);
  int (*context_device_)(int*);
  int (*push_)(Context);
  int (*pop_)(Context*);
  int (*context_id_)(Context, unsigned long long*);  // null where the driver has none
  int (*load_)(Module*, const void*);
  int (*unload_)(Module);
  int (*get_function_)(Function*, Module, const char*);
  int (*set_attribute_)(Function, int, int);
  int (*to_host_)(void*, Address, size_t);
  int (*to_device_)(Address, const void*, size_t);
  int (*synchronize_)(Stream);
  int (*copy_)(Address, Address, size_t, Stream);
  int (*allocate_)(Address*, size_t);
  int (*release_)(Address);
  int (*launch_)(Function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, Stream, void**, void**);
  int (*error_text_)(int, const char**);
};

}  // namespace claq::cuda
