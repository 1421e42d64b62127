#include <torch/csrc/stable/ops.h>

#include <memory>
#include <tuple>

#include "ops/cpu/adapted_linear.h"
#include "ops/cpu/by_sums.h"
#include "ops/cpu/scale.h"

namespace pyfastpeft {

namespace {

template <class C>
void ia3_forward(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& ia3_l,
                 bool feedforward, Tensor& y, const OptionalTensor& base) {
  int64_t m = x.size(0), n = weight.size(0), k = weight.size(1);
  Rows in = rows_of(x, m, k, "x"), out = rows_of(y, m, n, "y"), product = rows_of(base, m, n, "base");
  check_weight(weight, n, k, in.dtype);
  auto l = widened<C>(ia3_l, feedforward ? k : n, "ia3_l");
  if constexpr (sizeof(C) == 4) {
    if (upcasts(in.dtype)) {
      Buffer<float> wide(m, k);
      if (feedforward) {
        scale<float>(in, l.get(), wide.rows(), m, k);
      } else {
        convert(in, wide.rows(), m, k);
      }
      std::unique_ptr<float[]> shift(new float[n]());
      if (bias) kernels<float>().widen(dtype_of(*bias, "bias"), contiguous(*bias, {n}, "bias"), shift.get(), n);
      matmul_upcast(wide.data.get(), m, weight, false, [&](int64_t n0, int64_t columns, Rows block) {
        for (int64_t t = 0; t < m; ++t) {
          auto* row = reinterpret_cast<float*>(block.at(t));
          if (bias) kernels<float>().add(row, shift.get() + n0, columns);
          if (product) kernels<float>().narrow(product.dtype, row, product.at(t, n0), columns);
          if (!feedforward) kernels<float>().multiply(row, l.get() + n0, row, columns);
          kernels<float>().narrow(out.dtype, row, out.at(t, n0), columns);
        }
      });
      return;
    }
  }
  if (feedforward) {
    Tensor scaled = torch::stable::new_empty(x, x.sizes());
    scale<C>(in, l.get(), rows_of(scaled, m, k, "x"), m, k);
    matmul(scaled, weight, false, bias, y);
    return;
  }
  Tensor unscaled = base ? *base : y;
  matmul(x, weight, false, bias, unscaled);
  scale<C>(base ? product : out, l.get(), out, m, n);
}

template <class C>
void ia3_backward(const Tensor& dy, const OptionalTensor& x, const Tensor& weight, const Tensor& ia3_l,
                  bool feedforward, const OptionalTensor& base, OptionalTensor& dx, const OptionalTensor& dia3_l) {
  int64_t m = dy.size(0), n = weight.size(0), k = weight.size(1);
  int64_t features = feedforward ? k : n;
  STD_TORCH_CHECK(!dia3_l || (feedforward ? x : base), "dia3_l needs ", feedforward ? "x" : "base");
  Rows gradient = rows_of(dy, m, n, "dy"), in = rows_of(x, m, k, "x"), product = rows_of(base, m, n, "base");
  Rows out = rows_of(dx, m, k, "dx");
  Rows dl = dia3_l ? Rows{dtype_of(*dia3_l, "dia3_l"), contiguous(*dia3_l, {features}, "dia3_l"), 0} : Rows{};
  check_weight(weight, n, k, gradient.dtype);
  auto l = widened<C>(ia3_l, features, "ia3_l");

  if constexpr (sizeof(C) == 4) {
    if (upcasts(gradient.dtype)) {
      Buffer<float> wide(m, n), inner(m, k);
      if (feedforward) {
        convert(gradient, wide.rows(), m, n);
      } else {
        scale_and_reduce<float>(gradient, product, l.get(), wide.rows(), dl, m, n);
        if (!dx) return;
      }
      input_gradient(wide, m, weight, false, inner);
      if (feedforward) {
        scale_and_reduce<float>(inner.rows(), in, l.get(), out, dl, m, k);
      } else {
        convert(inner.rows(), out, m, k);
      }
      return;
    }
  }
  if (!feedforward && !dx) {
    scale_and_reduce<C>(gradient, product, l.get(), Rows{}, dl, m, n);
    return;
  }
  Tensor middle = torch::stable::new_empty(dy, {m, features});
  Rows middle_rows = rows_of(middle, m, features, "middle");
  if (feedforward) {
    matmul(dy, weight, true, std::nullopt, middle);
    scale_and_reduce<C>(middle_rows, in, l.get(), out, dl, m, k);
  } else {
    scale_and_reduce<C>(gradient, product, l.get(), middle_rows, dl, m, n);
    matmul(middle, weight, true, std::nullopt, *dx);
  }
}

// (dx, dia3_l), of those that are wanted; neither where the call is out of the ordinary. dx [..., K];  dia3_l as ia3_l
template <class C>
std::tuple<OptionalTensor, OptionalTensor> ia3_gradients(const Tensor& dy, const OptionalTensor& x,
                                                         const Tensor& weight, const Tensor& ia3_l, bool feedforward,
                                                         const OptionalTensor& base, bool need_x, bool need_l) {
  if (!on_cpu(dy)) return {};
  Rows gradient = separate_rows(dy), in = x ? separate_rows(*x) : Rows{};
  if (!gradient || (x && !in) || !sums_in<C>(gradient.dtype)) return {};
  int64_t n = weight.size(0), k = weight.size(1), m = dy.numel() / n;
  OptionalTensor rows, dx, out, dl;
  if (x) rows = as_matrix(*x, m, k, in.stride);
  if (need_x) dx = empty_rows(dy, k), out = as_matrix(*dx, m, k, k);
  if (need_l) dl = torch::stable::new_empty(ia3_l, ia3_l.sizes());
  ia3_backward<C>(as_matrix(dy, m, n, gradient.stride), rows, weight, ia3_l, feedforward, base, out, dl);
  return {dx, dl};
}

// (y, base), or none. y [..., N];  base, where it is wanted, [M, N]
template <class C>
std::tuple<OptionalTensor, OptionalTensor> ia3_call(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                                    const Tensor& ia3_l, bool feedforward, bool keep_base) {
  if (!on_cpu(x) || !on_cpu(ia3_l)) return {};
  Rows in = separate_rows(x);
  auto dtype = float_dtype(ia3_l);
  if (!linear(x, in, weight, bias) || !dtype || !sums_in<C>(in.dtype) || !sums_in<C>(*dtype)) return {};
  int64_t n = weight.size(0), k = weight.size(1), m = x.numel() / k;
  if (!shaped(ia3_l, {feedforward ? k : n})) return {};
  Tensor y = empty_rows(x, n), out = as_matrix(y, m, n, n);
  OptionalTensor base;
  if (keep_base) base = torch::stable::new_empty(x, {m, n});
  ia3_forward<C>(as_matrix(x, m, k, in.stride), weight, bias, ia3_l, feedforward, out, base);
  return {y, base};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyfastpeft, CPU, m) {
  m.impl("ia3_forward", BOX_BY_SUMS(ia3_forward));
  m.impl("ia3_backward", BOX_BY_SUMS(ia3_backward));
}

STABLE_TORCH_LIBRARY_IMPL(pyfastpeft, CompositeExplicitAutograd, m) {
  m.impl("ia3_call", BOX_BY_SUMS(ia3_call));
  m.impl("ia3_gradients", BOX_BY_SUMS(ia3_gradients));
}

}  // namespace pyfastpeft
