// Stands for csrc/ops/cuda/device.h: tensors are on the CPU, and so is what runs.
#pragma once
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include "ops/checks.h"

#define aoti_torch_cuda_addmm_out aoti_torch_cpu_addmm_out

namespace pyfastpeft {

class OnDevice {
 public:
  explicit OnDevice(const Tensor& t) { STD_TORCH_CHECK(t.is_cpu(), "the emulator takes CPU tensors"); }
  cudaStream_t stream() const { return nullptr; }
};

}  // namespace pyfastpeft
