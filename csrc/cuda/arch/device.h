// The GPUs that the CUDA run-time library finds. The list is empty where there is no GPU or no driver.
#pragma once

#include <string>
#include <vector>

namespace sleepkern::cuda {

struct Device {
  std::string name;
  int major, minor;  // compute capability
  size_t memory;     // bytes
  int multiprocessors;
  size_t shared_memory;  // most bytes that a CTA may have
};

std::vector<Device> devices();

}  // namespace sleepkern::cuda
