// A linear layer with a low-rank branch, of one adapter or of many.
#pragma once
#include "ops/cpu/base.h"
#include "ops/cpu/lowrank.h"

namespace pyfastpeft {

// y = x W^T + bias + scaling * s B^T, the last for every adapter's tokens.
// x: [M, K];  wide: x in float32, where upcasts tells so;  weight: [N, K];  bias: [N];  s: [M, s_stride];  y: [M, N], out
template <class C>
void adapted_linear(const Tensor& x, const Buffer<float>& wide, const Tensor& weight, const OptionalTensor& bias,
                    const Branch<C>& branch, const C* s, int64_t s_stride, Tensor& y);

// sum = dy W or, to `add`, sum += dy W.  dy: [M, N];  weight: [N, K];  sum: [M, K], out
void input_gradient(const Buffer<float>& dy, int64_t m, const Tensor& weight, bool add, Buffer<float>& sum);

}  // namespace pyfastpeft
