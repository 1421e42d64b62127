// csrc/ops/cuda/counters.h, and what the emulator says to runtime.h, as ops, for tests.
#include "ops/cuda/runtime.h"

#include "ops/cuda/counters.h"

namespace pyfastpeft {

int64_t limit_of_shared(const Tensor&) { return shared_limit(); }

__global__ void empty_kernel() {}

// Launches a kernel that may have `allowed` bytes of dynamic shared memory with `shared`.
void launch_with(const Tensor&, int64_t allowed, int64_t shared) {
  check(cudaFuncSetAttribute(empty_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, allowed), "shared memory");
  cudaLaunchConfig_t config{};
  config.dynamicSmemBytes = shared;
  check(cudaLaunchKernelEx(&config, empty_kernel), "launch");
}

// Launches a kernel with so many bytes of dynamic shared memory as another thread is between asking for more and its own
// launch.
void launch_between(const Tensor&, int64_t shared, int64_t more) {
  allow_shared(empty_kernel, more);
  launch(empty_kernel, dim3(1), dim3(1), shared, nullptr);
  cudaLaunchConfig_t config{};
  config.dynamicSmemBytes = more;
  check(cudaLaunchKernelEx(&config, empty_kernel), "launch");
}

// Where the counters are for a launch on stream number `stream`; 0: in a tensor of their own.
int64_t counters_at(const Tensor& like, int64_t stream) {
  OptionalTensor own;
  int* zeros = counters(like, reinterpret_cast<cudaStream_t>(stream), own);
  return own ? 0 : reinterpret_cast<int64_t>(zeros);
}

}  // namespace pyfastpeft

STABLE_TORCH_LIBRARY_FRAGMENT(pyfastpeft, m) {
  m.def("shared_limit(Tensor like) -> int");
  m.def("launch_with(Tensor like, int allowed, int shared) -> ()");
  m.def("launch_between(Tensor like, int shared, int more) -> ()");
  m.def("counters_at(Tensor like, int stream) -> int");
}
STABLE_TORCH_LIBRARY_IMPL(pyfastpeft, CUDA, m) {
  m.impl("shared_limit", TORCH_BOX(&pyfastpeft::limit_of_shared));
  m.impl("launch_with", TORCH_BOX(&pyfastpeft::launch_with));
  m.impl("launch_between", TORCH_BOX(&pyfastpeft::launch_between));
  m.impl("counters_at", TORCH_BOX(&pyfastpeft::counters_at));
}
