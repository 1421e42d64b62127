// A frozen layer without adapters, for CPUs and dtypes of which torch's own product is slow.
#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "ops/cpu/adapted_linear.h"

namespace pyfastpeft {

namespace {

constexpr int64_t WIDENED = 1 << 26;  // elements of dy that are float32 at a time: heads are as wide as a vocabulary

bool prefers_own_linear(const Tensor& weight) {
  auto dtype = float_dtype(weight);
  return on_cpu(weight) && dtype && !fast_matmul(*dtype);
}

// y [..., N] = x W^T + bias, or none where torch is the faster one or the call is out of the ordinary.
OptionalTensor linear_call(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  if (!on_cpu(x) || !prefers_own_linear(weight)) return {};
  Rows in = separate_rows(x);
  if (!linear(x, in, weight, bias)) return {};
  int64_t n = weight.size(0), k = weight.size(1), m = x.numel() / k;
  bool upcast = upcasts(in.dtype);
  Buffer<float> wide(upcast ? m : 0, k);
  if (upcast) convert(in, wide.rows(), m, k);
  Tensor y = empty_rows(x, n), out = as_matrix(y, m, n, n);
  adapted_linear<float>(as_matrix(x, m, k, in.stride), wide, weight, bias, {{}, k, n}, nullptr, 0, out);
  return y;
}

// dx [..., K] = dy W, or none.
OptionalTensor linear_gradient(const Tensor& dy, const Tensor& weight) {
  if (!on_cpu(dy) || !prefers_own_linear(weight)) return {};
  Rows gradient = separate_rows(dy);
  if (!gradient || gradient.dtype != float_dtype(weight)) return {};
  int64_t n = weight.size(0), k = weight.size(1), m = dy.numel() / n;
  Tensor dx = empty_rows(dy, k), out = as_matrix(dx, m, k, k);
  if (upcasts(gradient.dtype)) {
    int64_t height = std::max<int64_t>(1, std::min(m, WIDENED / n));
    Buffer<float> wide(height, n), sum(height, k);
    Rows to = rows_of(out, m, k, "dx");
    for (int64_t t = 0; t < m; t += height) {
      int64_t count = std::min(height, m - t);
      convert({gradient.dtype, gradient.at(t), gradient.stride}, wide.rows(), count, n);
      input_gradient(wide, count, weight, false, sum);
      convert(sum.rows(), {to.dtype, to.at(t), to.stride}, count, k);
    }
  } else {
    matmul(as_matrix(dy, m, n, gradient.stride), weight, true, std::nullopt, out);
  }
  return dx;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyfastpeft, CompositeExplicitAutograd, m) {
  m.impl("linear_call", TORCH_BOX(&linear_call));
  m.impl("linear_gradient", TORCH_BOX(&linear_gradient));
  m.impl("prefers_own_linear", TORCH_BOX(&prefers_own_linear));
}

}  // namespace pyfastpeft
