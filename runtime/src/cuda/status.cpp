#include "status.h"

#include "driver.h"
#include "package.h"

namespace claq::cuda {

bool usable(std::string& text) {
  try {
    // Without kernels the driver is not even started: a process that has started it cannot use GPUs in forked children.
    if (Driver::present() && !any_package()) throw Error("no kernels for GPUs in " + kernel_folder());
    const Driver& driver = Driver::get();
    const int count = driver.device_count();
    if (count == 0) throw Error("the CUDA driver sees no GPU");
    text.clear();
    for (int device = 0; device < count; ++device) {
      const int capability = driver.capability(device);
      const std::string name = "GPU " + std::to_string(device) + " (compute capability " + std::to_string(capability / 10) + "." +
                               std::to_string(capability % 10) + ")";
      const std::string path = package_for(capability);
      if (path.empty()) throw Error("no kernels for " + name + " in " + kernel_folder());
      const auto package = Package::at(path);
      text += (text.empty() ? "" : "; ") + name + ": " + std::to_string(package->records().size()) + " kernels of " +
              path.substr(path.rfind('/') + 1);
    }
    return true;
  } catch (const Error& error) {
    text = error.what();
    return false;
  }
}

}  // namespace claq::cuda
