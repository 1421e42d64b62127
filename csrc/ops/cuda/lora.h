// LoRA's passes over one layer, for ops that stand on them.
#pragma once
#include "ops/checks.h"

namespace pyfastpeft {

// s = drop(x) lora_A^T;  y = scale * (x weight^T + scaling * s lora_B^T) + bias; without weight y += scaling * s lora_B^T.
// False, and nothing done, where there is a scale and no epilogue that takes it.
// x: [M, K];  y: [M, N], out;  s: [M, r] float32, out;  scale: [N] float32
bool lora_forward(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& lora_A,
                  const Tensor& lora_B, double scaling, double dropout_p, const OptionalTensor& seed, Tensor y, Tensor s,
                  const OptionalTensor& scale = {});

// The gradients that are given, of that. With a scale, scaled_dy [M, N] is dy times the scale, where dx is given.
void lora_backward(const Tensor& dy, const OptionalTensor& x, const OptionalTensor& weight, const Tensor& lora_A,
                   const Tensor& lora_B, double scaling, double dropout_p, const OptionalTensor& seed,
                   const OptionalTensor& s, OptionalTensor dx, const OptionalTensor& dlora_A,
                   const OptionalTensor& dlora_B, const OptionalTensor& scale = {},
                   const OptionalTensor& scaled_dy = {});

// s = x factor^T.  x: [M, K] 16-bit;  factor: [r, K], of x's dtype or float32;  s: [M, r] float32, out
void lora_shrink(const Tensor& x, const Tensor& factor, Tensor& s);

}  // namespace pyfastpeft
