// Stands for csrc/ops/cuda/device.h: tensors are on the CPU, and so is what runs.
#pragma once
#include <cuda_runtime.h>

#include "ops/checks.h"

namespace pyfastpeft {

class OnDevice {
 public:
  explicit OnDevice(const Tensor& t) { STD_TORCH_CHECK(t.is_cpu(), "the emulator takes CPU tensors"); }
  cudaStream_t stream() const { return nullptr; }
};

}  // namespace pyfastpeft
