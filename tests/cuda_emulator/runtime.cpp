// What the emulator says to csrc/ops/cuda/runtime.h, as ops, for tests.
#include "ops/cuda/runtime.h"

namespace pyfastpeft {

int64_t shared_limit(const Tensor&) {
  int bytes = 0;
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0), "device");
  return bytes;
}

__global__ void empty_kernel() {}

// Launches a kernel that may have `allowed` bytes of dynamic shared memory with `shared`.
void launch_with(const Tensor&, int64_t allowed, int64_t shared) {
  check(cudaFuncSetAttribute(empty_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, allowed), "shared memory");
  cudaLaunchConfig_t config{};
  config.dynamicSmemBytes = shared;
  check(cudaLaunchKernelEx(&config, empty_kernel), "launch");
}

}  // namespace pyfastpeft

STABLE_TORCH_LIBRARY_FRAGMENT(pyfastpeft, m) {
  m.def("shared_limit(Tensor like) -> int");
  m.def("launch_with(Tensor like, int allowed, int shared) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(pyfastpeft, CUDA, m) {
  m.impl("shared_limit", TORCH_BOX(&pyfastpeft::shared_limit));
  m.impl("launch_with", TORCH_BOX(&pyfastpeft::launch_with));
}
