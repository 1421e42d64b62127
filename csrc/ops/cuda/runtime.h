// What every op on CUDA tensors needs of the CUDA runtime: the device, its stream, scratch memory, launches.
#pragma once
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include "ops/checks.h"

// Weak, so that the library loads where torch is one for the CPU.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace pyfastpeft {

inline void check(cudaError_t error, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, what, ": ", cudaGetErrorString(error));
}

// While it lives, the device of t is the current one.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& t) : guard_(t.get_device_index()) {
    STD_TORCH_CHECK(t.is_cuda(), "this kernel takes CUDA tensors");
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream, "this torch is not one for CUDA");
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  cudaStream_t stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

// An uninitialised tensor beside t, from torch's caching allocator: safe to drop while the stream still uses it.
inline Tensor scratch(const Tensor& t, std::initializer_list<int64_t> shape, ScalarType dtype) {
  return torch::stable::new_empty(t, shape, dtype);
}

// Runs a kernel on the stream; `shared` is its dynamic shared memory in bytes.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared, cudaStream_t stream,
            Arguments&&... arguments) {
  if (shared > 48 * 1024) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)),
          "shared memory");
  }
  kernel<<<grid, block, shared, stream>>>(static_cast<Parameters>(arguments)...);
  check(cudaGetLastError(), "launch");
}

}  // namespace pyfastpeft
