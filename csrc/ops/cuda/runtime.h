// What every op on CUDA tensors needs of the CUDA runtime: scratch memory and launches.
#pragma once
#include <cuda_runtime.h>
#include <torch/csrc/stable/ops.h>

#include "ops/checks.h"
#include "ops/cuda/device.h"

namespace pyfastpeft {

inline void check(cudaError_t error, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, what, ": ", cudaGetErrorString(error));
}

// An uninitialised tensor beside t, from torch's caching allocator: safe to drop while the stream still uses it.
inline Tensor scratch(const Tensor& t, std::initializer_list<int64_t> shape, ScalarType dtype) {
  return torch::stable::new_empty(t, shape, dtype);
}

// Bytes of shared memory that a block may have on every GPU from sm_80 on.
constexpr int kLeastShared = 99 * 1024;

// Those that it may have on the current device.
inline size_t shared_limit() {
  int device = 0, limit = 0;
  check(cudaGetDevice(&device), "device");
  check(cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "shared memory");
  return limit;
}

// Lets a kernel have so many bytes of dynamic shared memory: as many as the device has, since another thread may be
// about to launch it with more.
template <class... Parameters>
void allow_shared(void (*kernel)(Parameters...), size_t shared) {
  if (shared <= 48 * 1024) return;
  int bytes = static_cast<int>(std::max(shared, shared_limit()));
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), "shared memory");
}

// Runs a kernel on the stream; `shared` is its dynamic shared memory in bytes.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared, cudaStream_t stream,
            Arguments&&... arguments) {
  allow_shared(kernel, shared);
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), "launch");
}

// How many blocks of a kernel run at once on the current device.
template <class... Parameters>
int64_t resident_blocks(void (*kernel)(Parameters...), int threads, size_t shared) {
  int device = 0, multiprocessors = 0, blocks = 0;
  allow_shared(kernel, shared);
  check(cudaGetDevice(&device), "device");
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), "multiprocessors");
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, shared), "occupancy");
  return int64_t(multiprocessors) * std::max(blocks, 1);
}

}  // namespace pyfastpeft
