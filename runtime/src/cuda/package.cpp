#include "package.h"

#include <dirent.h>
#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace claq::cuda {
namespace {

constexpr char kMagic[] = "CLAQKRN2";
constexpr size_t kHeaderSize = 16;
constexpr size_t kRecordSize = 256;
constexpr int kOldestCapability = 80;

std::vector<unsigned char> read_file(const std::string& path) {
  const std::unique_ptr<FILE, int (*)(FILE*)> file(std::fopen(path.c_str(), "rb"), std::fclose);
  if (!file) throw Error(path + ": cannot be opened");
  std::vector<unsigned char> data;
  unsigned char buffer[1 << 16];
  while (const size_t count = std::fread(buffer, 1, sizeof buffer, file.get())) data.insert(data.end(), buffer, buffer + count);
  if (std::ferror(file.get())) throw Error(path + ": cannot be read");
  return data;
}

template <class T>
T number(const unsigned char* from) {  // little-endian, as every host with a CUDA device is
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

std::string text(const unsigned char* from, size_t room) {
  const void* end = std::memchr(from, 0, room);
  if (!end) throw Error("a text of a record has no end");
  return std::string(reinterpret_cast<const char*>(from), static_cast<const unsigned char*>(end) - from);
}

// What the host divides by or counts in, by the first word of a kernel's name.
struct Needs {
  const char* kind;
  bool tile[3];
  uint32_t vectors;  // at least
};
constexpr Needs kNeeds[] = {
    {"gemv", {true, false, true}, 2},  // a float32 row takes two
    {"gemm", {true, true, true}, 1},
    {"quantize", {false, false, true}, 0},
    {"finish", {true, true, false}, 0},
    {"dequantize", {true, false, true}, 0},
    {"outliers", {true, false, false}, 0},
    {"gather", {false, false, true}, 0},
    {"add", {true, false, false}, 0},
    {"swiglu", {true, false, false}, 0},
    {"take", {true, false, false}, 0},
    {"turn", {true, false, false}, 0},
};

void check_launch(const Record& record) {
  const std::string kind = record.name.substr(0, record.name.find('_'));
  for (const Needs& needs : kNeeds) {
    if (kind != needs.kind) continue;
    for (size_t i = 0; i < 3; ++i) {
      if (needs.tile[i] && record.tile[i] == 0) throw Error(record.name + ": tile[" + std::to_string(i) + "] is 0, expected at least 1");
    }
    if (record.most_vectors < needs.vectors) {
      throw Error(record.name + ": most_vectors is " + std::to_string(record.most_vectors) + ", expected at least " +
                  std::to_string(needs.vectors));
    }
  }
}

Record read_record(const std::vector<unsigned char>& data, size_t at) {
  const unsigned char* from = data.data() + at;
  Record record;
  record.name = text(from, 64);
  record.entry = text(from + 64, 48);
  record.parameters = text(from + 112, 32);
  const auto warps = number<uint32_t>(from + 144);
  if (warps < 1 || warps > 32) throw Error(record.name + ": has " + std::to_string(warps) + " warps, expected 1 to 32");
  record.threads = 32 * warps;
  record.shared = number<uint32_t>(from + 148);
  for (size_t i = 0; i < 3; ++i) record.tile[i] = number<uint32_t>(from + 152 + 4 * i);
  const bool ptx = number<uint32_t>(from + 164) != 0;
  const auto offset = number<uint64_t>(from + 168), size = number<uint64_t>(from + 176);
  if (size == 0 || offset > data.size() || size > data.size() - offset) throw Error(record.name + ": its image is outside the file");
  if (ptx ? data[offset + size - 1] != 0 : size < 4 || std::memcmp(&data[offset], "\177ELF", 4) != 0) {
    throw Error(record.name + ": its image is damaged");
  }
  record.offset = offset;
  record.most_vectors = number<uint32_t>(from + 216);
  record.programs = number<uint32_t>(from + 220);
  check_launch(record);
  return record;
}

std::string library_folder() {
  Dl_info info;
  if (!dladdr(reinterpret_cast<const void*>(&library_folder), &info) || !info.dli_fname) return ".";
  const std::string path = info.dli_fname;
  const size_t slash = path.rfind('/');
  return slash == std::string::npos ? "." : path.substr(0, slash);
}

// Numbers in the folder's names `<prefix><number>.kernels`.
std::vector<int> numbers_of(const std::string& folder, const std::string& prefix) {
  std::vector<int> found;
  const std::unique_ptr<DIR, int (*)(DIR*)> directory(opendir(folder.c_str()), closedir);
  if (!directory) return found;
  while (const dirent* entry = readdir(directory.get())) {
    const std::string name = entry->d_name;
    char* end = nullptr;
    if (name.compare(0, prefix.size(), prefix) != 0) continue;
    const long value = std::strtol(name.c_str() + prefix.size(), &end, 10);
    if (end != name.c_str() + prefix.size() && std::strcmp(end, ".kernels") == 0) found.push_back(static_cast<int>(value));
  }
  return found;
}

}  // namespace

Package::Package(const std::string& path) : data_(read_file(path)) {
  try {
    if (data_.size() < kHeaderSize || std::memcmp(data_.data(), kMagic, 8) != 0) throw Error("is not a package of claq kernels");
    const auto count = number<uint32_t>(data_.data() + 8);
    if (count > (data_.size() - kHeaderSize) / kRecordSize) throw Error("is truncated");
    for (uint32_t i = 0; i < count; ++i) records_.push_back(read_record(data_, kHeaderSize + i * kRecordSize));
  } catch (const Error& error) {
    throw Error(path + ": " + error.what());
  }
  std::sort(records_.begin(), records_.end(), [](const Record& a, const Record& b) { return a.name < b.name; });
}

std::shared_ptr<const Package> Package::at(const std::string& path) {
  static std::mutex mutex;
  static auto* packages = new std::map<std::string, std::shared_ptr<const Package>>;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = packages->find(path);
  if (found != packages->end()) return found->second;
  auto package = std::make_shared<const Package>(path);  // what cannot be read is tried again at the next call
  packages->emplace(path, package);
  return package;
}

const Record* Package::find(const std::string& name) const {
  const auto found = std::lower_bound(records_.begin(), records_.end(), name,
                                      [](const Record& record, const std::string& wanted) { return record.name < wanted; });
  return found != records_.end() && found->name == name ? &*found : nullptr;
}

std::string kernel_folder() {
  const char* folder = std::getenv("CLAQ_CUDA_KERNELS");
  return folder && *folder ? folder : library_folder() + "/cuda";
}

bool any_package() {
  const std::string folder = kernel_folder();
  return !numbers_of(folder, "claq_sm").empty() || !numbers_of(folder, "claq_ptx").empty();
}

std::string package_for(int capability) {
  const std::string folder = kernel_folder();
  int best = 0;
  for (const int built : numbers_of(folder, "claq_sm")) {
    // Before sm_90 code runs on later chips of the same major number; since, on its own generation alone.
    const bool fits = capability < 90 ? built / 10 == capability / 10 && built <= capability : built == capability;
    if (fits) best = std::max(best, built);
  }
  if (best) return folder + "/claq_sm" + std::to_string(best) + ".kernels";
  for (const int built : numbers_of(folder, "claq_ptx")) {
    if (built <= capability) best = std::max(best, built);
  }
  return best && capability >= kOldestCapability ? folder + "/claq_ptx" + std::to_string(best) + ".kernels" : "";
}

Kernels& Kernels::current() {
  static std::mutex mutex;
  static auto* contexts = new std::map<uint64_t, std::unique_ptr<Kernels>>;  // by number: an address may be used again

  const Driver& driver = Driver::get();
  const uint64_t context = driver.id(driver.current());
  const std::lock_guard<std::mutex> lock(mutex);
  auto& kernels = (*contexts)[context];
  if (kernels) return *kernels;
  const int device = driver.current_device();
  const int capability = driver.capability(device);
  const std::string path = package_for(capability);
  if (path.empty()) {
    throw Error("no kernels for this GPU (compute capability " + std::to_string(capability / 10) + "." + std::to_string(capability % 10) +
                ") in " + kernel_folder());
  }
  auto made = std::make_unique<Kernels>();
  made->package_ = Package::at(path);
  made->multiprocessors_ = driver.multiprocessors(device);
  kernels = std::move(made);
  return *kernels;
}

const Kernel& Kernels::get(const std::string& name) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto found = loaded_.find(name);
  if (found != loaded_.end()) return found->second;
  const Record* record = package_->find(name);
  if (!record) throw Error("the package of kernels has no " + name);
  const Driver& driver = Driver::get();
  const auto unload = [&driver](Module module) { driver.unload(module); };
  std::unique_ptr<void, decltype(unload)> module(driver.load(package_->image(*record)), unload);
  const Function function = driver.function(module.get(), record->entry.c_str(), record->shared);
  const Kernel& kernel = loaded_.emplace(name, Kernel{function, record}).first->second;
  module.release();  // it stays
  return kernel;
}

}  // namespace claq::cuda
