// The base layer's products: by torch, which is cuBLAS on CUDA tensors, or by gemm.h, which takes a branch along.
#pragma once
#include <torch/csrc/stable/library.h>

#include <array>

#include "ops/checks.h"
#include "ops/cuda/device.h"
#include "ops/cuda/gemm.h"

namespace pyfastpeft {

// y = x weight^T + bias.  x: [M, K];  weight: [N, K] of any strides;  bias: [N];  y: [M, N]
inline void base_forward(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, Tensor& y) {
  using torch::stable::detail::from;
  std::array<StableIValue, 4> stack{from(x), from(weight), from(bias), from(y)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);
}

// dx = dy weight or, to `add`, dx += that.  dy: [M, N];  weight: [N, K];  dx: [M, K]
inline void base_backward(const Tensor& dy, const Tensor& weight, Tensor& dx, bool add = false) {
  using torch::stable::detail::from;
  if (add) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_cuda_addmm_out(dx.get(), dx.get(), dy.get(), weight.get(), 1, 1));
    return;
  }
  std::array<StableIValue, 3> stack{from(dy), from(weight), from(dx)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);
}

inline void multiply(const Gemm& it, cudaStream_t stream) {
  const char* error = gemm(it, stream);
  STD_TORCH_CHECK(!error, "product: ", error);
}

}  // namespace pyfastpeft
