// What the CUDA run-time library says of the machine; usable, and empty, where there is no GPU or no driver.
#pragma once

#include <string>
#include <vector>

namespace sleepkern::cuda {

struct Device {
  std::string name;
  int major, minor;  // compute capability
  size_t memory;     // bytes
  int multiprocessors;
  size_t shared_memory;  // bytes a block may opt into
};

std::vector<Device> devices();

}  // namespace sleepkern::cuda
