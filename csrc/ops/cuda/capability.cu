#include <torch/csrc/stable/library.h>

#include <string>

#include "ops/cuda/runtime.h"

namespace pyfastpeft {

namespace {

// What this library was built with, and the device that it runs on or why there is none.
std::string cuda_capability() {
#ifdef PYFASTPEFT_CUTLASS
  std::string built = "CUTLASS";
#else
  std::string built = "no CUTLASS";
#endif
  built = "CUDA " + std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10) + ", " + built;
  cudaDeviceProp device;
  cudaError_t error = cudaGetDeviceProperties(&device, 0);
  if (error != cudaSuccess) {
    cudaGetLastError();
    return built + "; no device: " + cudaGetErrorString(error);
  }
  return built + "; sm_" + std::to_string(device.major * 10 + device.minor);
}

}  // namespace

}  // namespace pyfastpeft

STABLE_TORCH_LIBRARY_IMPL(pyfastpeft, CompositeExplicitAutograd, m) {
  m.impl("cuda_capability", TORCH_BOX(&pyfastpeft::cuda_capability));
}
