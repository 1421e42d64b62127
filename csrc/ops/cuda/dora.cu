// DoRA on 16-bit CUDA tensors (reference.py has the formulas): LoRA's passes, with a scale of every column of y.
#include <torch/csrc/stable/library.h>

#include "ops/cuda/columns.h"
#include "ops/cuda/lora.h"

namespace pyfastpeft {

namespace {

constexpr int kNormThreads = 256, kNormWarps = kNormThreads / 32;

__device__ __forceinline__ float sum_of_warp(float value) {
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(~0u, value, distance);
  return value;
}

// gram[i, j] = factor[i] . factor[j].  One warp an element.  factor: [r, K];  gram: [r, r]
__global__ void __launch_bounds__(kNormThreads) gram_kernel(const float* factor, float* gram, int rank, int columns) {
  int at = blockIdx.x * kNormWarps + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (at >= rank * rank) return;
  const float *left = factor + int64_t(at / rank) * columns, *right = factor + int64_t(at % rank) * columns;
  float sum = 0;
  for (int k = lane; k < columns; k += 32) sum += left[k] * right[k];
  sum = sum_of_warp(sum);
  if (lane == 0) gram[at] = sum;
}

// norm[n] = root of ||weight[n]||^2 + 2 scaling <product[n], lora_B[n]> + scaling^2 <lora_B[n] gram, lora_B[n]>, a square
// below 0 counting as 0; squares[n], unless null, is ||weight[n]||^2.  One warp a row.
// weight: [N, K] at a stride;  product = weight lora_A^T: [N, r];  lora_B: [N, r];  gram = lora_A lora_A^T: [r, r]
template <class T, bool vector>
__global__ void __launch_bounds__(kNormThreads)
    norm_kernel(const T* weight, int64_t stride, const float* product, AnyFloats lora_B, const float* gram,
                const float* squares, float scaling, float* norm, int64_t rows, int columns, int rank) {
  using R = Run<T, vector>;
  int64_t n = int64_t(blockIdx.x) * kNormWarps + threadIdx.x / 32;
  int lane = threadIdx.x % 32;
  if (n >= rows) return;
  float sum = 0;
  if (!squares) {
#pragma unroll 4
    for (int k = lane * R::size; k < columns; k += 32 * R::size) {
      R run = R::load(weight + n * stride + k);
#pragma unroll
      for (int i = 0; i < R::size; ++i) sum += run.of[i] * run.of[i];
    }
  }
  for (int j = lane; j < rank; j += 32) {
    float b = lora_B.at<float>(n * rank + j), inner = 0;
    for (int i = 0; i < rank; ++i) inner += lora_B.at<float>(n * rank + i) * gram[i * rank + j];
    sum += b * (2 * scaling * product[n * rank + j] + scaling * scaling * inner);
  }
  sum = sum_of_warp(sum);
  if (squares) sum += squares[n];
  if (lane == 0) norm[n] = sum < 0 ? 0.0f : sqrtf(sum);  // NaN stays
}

void dora_norm(const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B, double scaling,
               const OptionalTensor& weight_norm_squared, Tensor& norm) {
  OnDevice device(weight);
  int64_t n = weight.size(0), k = weight.size(1), rank = lora_A.size(0);
  Rows rows = rows_of(weight, n, k, "weight");
  // Exact sums, since terms may cancel: with float32 factors lora_shrink's are.
  Tensor wide = widened(lora_A, {rank, k}, "lora_A", device.stream());
  AnyFloats up = floats(lora_B, {n, rank}, "lora_B");
  auto* from = weight_norm_squared ? sums<float>(*weight_norm_squared, {n}, "weight_norm_squared") : nullptr;
  auto* to = sums<float>(norm, {n}, "norm");
  Tensor product = scratch(weight, {n, rank}, ScalarType::Float), gram = scratch(weight, {rank, rank}, ScalarType::Float);
  lora_shrink(weight, wide, product);
  launch(gram_kernel, dim3((rank * rank + kNormWarps - 1) / kNormWarps), dim3(kNormThreads), 0, device.stream(),
         static_cast<const float*>(wide.const_data_ptr()), static_cast<float*>(gram.mutable_data_ptr()), rank, k);
  with_type(rows.dtype, [&]<class T>(T) {
    auto run = [&](auto kernel) {
      launch(kernel, dim3((n + kNormWarps - 1) / kNormWarps), dim3(kNormThreads), 0, device.stream(),
             reinterpret_cast<const T*>(rows.data), rows.stride, static_cast<const float*>(product.const_data_ptr()),
             up, static_cast<const float*>(gram.const_data_ptr()), from, scaling, to, n, k, rank);
    };
    if constexpr (kShort<T>) in_runs(rows, k) ? run(norm_kernel<T, true>) : run(norm_kernel<T, false>);
  });
}

void dora_forward(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& lora_A,
                  const Tensor& lora_B, const Tensor& scale, double scaling, double dropout_p,
                  const OptionalTensor& seed, Tensor& y, Tensor& s, OptionalTensor unscaled) {
  if (!unscaled && lora_forward(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed, y, s, scale)) return;
  OnDevice device(x);
  int64_t m = x.size(0), n = weight.size(0);
  Tensor product = unscaled ? *unscaled : y;
  lora_forward(x, weight, {}, lora_A, lora_B, scaling, dropout_p, seed, product, s);
  pyfastpeft::scale(rows_of(product, m, n, "unscaled"), floats(scale, {n}, "scale"),
                    bias ? contiguous(*bias, {n}, "bias") : nullptr, rows_of(y, m, n, "y"), m, n, device.stream());
}

void dora_backward(const Tensor& dy, const OptionalTensor& x, const Tensor& weight, const Tensor& lora_A,
                   const Tensor& lora_B, const Tensor& scale, double scaling, double dropout_p,
                   const OptionalTensor& seed, const OptionalTensor& s, const OptionalTensor& unscaled,
                   OptionalTensor dx, OptionalTensor dlora_A, OptionalTensor dlora_B, OptionalTensor dscale) {
  OnDevice device(dy);
  int64_t m = dy.size(0), n = weight.size(0);
  STD_TORCH_CHECK(!dscale || unscaled, "dscale needs unscaled");
  Rows gradient = rows_of(dy, m, n, "dy"), product = rows_of(unscaled, m, n, "unscaled"), scaled;
  AnyFloats by = floats(scale, {n}, "scale");
  OptionalTensor du;
  if (dx) {
    du = scratch(dy, {m, n}, dy.scalar_type());
    scaled = rows_of(du, m, n, "dy");
  }
  if (dscale) {
    scale_and_sum(dy, gradient, product, by, scaled, floats(*dscale, {n}, "dscale"), m, n, device.stream());
  } else if (dx) {
    pyfastpeft::scale(gradient, by, nullptr, scaled, m, n, device.stream());
  }
  if (dx || dlora_A || dlora_B)
    lora_backward(dy, x, weight, lora_A, lora_B, scaling, dropout_p, seed, s, dx, dlora_A, dlora_B, scale, du);
}

}  // namespace

}  // namespace pyfastpeft

STABLE_TORCH_LIBRARY_IMPL(pyfastpeft, CUDA, m) {
  m.impl("dora_norm", TORCH_BOX(&pyfastpeft::dora_norm));
  m.impl("dora_forward", TORCH_BOX(&pyfastpeft::dora_forward));
  m.impl("dora_backward", TORCH_BOX(&pyfastpeft::dora_backward));
}
