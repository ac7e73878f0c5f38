// Kernels compiled ahead of time: the files that `python -m claq_export.kernels.aot` writes (layout: kernels/aot/package.py),
// and the functions of a device that were loaded from them.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "driver.h"

namespace claq::cuda {

// One kernel of a package, and how it is launched.
struct Record {
  std::string name;
  std::string entry;
  std::string parameters;  // a letter each: p = pointer, i = int32
  unsigned threads;
  unsigned shared;
  uint32_t tile[3];  // output features, rows of x, blocks of 32 columns a program takes
  uint32_t most_vectors;
  uint32_t programs;
  size_t offset;  // of the image in the file
};

// A file of kernels in memory. Throws Error if it is missing, truncated, no package, or describes launches that cannot be.
class Package {
 public:
  explicit Package(const std::string& path);
  // The package of that path, read at the first call that finds it and kept for the process: sessions come and go.
  static std::shared_ptr<const Package> at(const std::string& path);
  const Record* find(const std::string& name) const;  // null if it has none of that name
  const std::vector<Record>& records() const { return records_; }
  const void* image(const Record& record) const { return data_.data() + record.offset; }

 private:
  std::vector<unsigned char> data_;
  std::vector<Record> records_;  // by name
};

// A kernel that a context can launch.
struct Kernel {
  Function function;
  const Record* record;
};

// The kernels of one context. A kernel is loaded when it is first asked for, under a lock; it is valid as long as the process.
class Kernels {
 public:
  // Those of the calling thread's context. Throws Error if no package fits its device.
  static Kernels& current();

  const Kernel& get(const std::string& name);
  const Package& package() const { return *package_; }
  int multiprocessors() const { return multiprocessors_; }

 private:
  std::shared_ptr<const Package> package_;
  int multiprocessors_ = 0;
  std::mutex mutex_;
  std::map<std::string, Kernel> loaded_;
};

// Folder of the packages: CLAQ_CUDA_KERNELS of the environment, else `cuda` beside this library.
std::string kernel_folder();

// Whether it holds a package for any GPU.
bool any_package();

// File that serves a device: the cubins of its generation, else PTX that the driver assembles; empty if there is none.
std::string package_for(int capability);

}  // namespace claq::cuda
