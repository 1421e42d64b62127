#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <memory>
#include <string>

#include "ops/cpu/base.h"
#include "ops/cpu/by_sums.h"
#include "ops/cpu/lowrank.h"

namespace pyfastpeft {

namespace {

Activation activation_of(const std::string& name) {
  const char* const names[] = {"relu", "gelu", "gelu_tanh", "silu", "tanh", "identity"};
  for (int i = 0; i < 6; ++i)
    if (name == names[i]) return Activation(i);
  STD_TORCH_CHECK(false, "activation must not be '", name, "'");
}

// f(s + shift) for every token, f(row) working in place.  s, result: [tokens, rank]
template <class C, class F>
Tensor middle(const Tensor& s, const C* shift, F f) {
  int64_t tokens = s.size(0), rank = s.size(1);
  Tensor result = torch::stable::new_empty(s, {tokens, rank});
  const C* in = sums<C>(s, {tokens, rank}, "s");
  C* out = sums<C>(result, {tokens, rank}, "s");
  torch::stable::parallel_for(0, tokens, 1 + 4096 / rank, [&](int64_t begin, int64_t end) {
    std::copy_n(in + begin * rank, (end - begin) * rank, out + begin * rank);
    for (int64_t t = begin; shift && t < end; ++t) kernels<C>().add(out + t * rank, shift, rank);
    f(out + begin * rank, begin * rank, (end - begin) * rank);
  });
  return result;
}

// Whether whole products by `matmul` serve, which at the ranks of bottlenecks are faster: where all is of one dtype, and it is
// that of the sums or the CPU multiplies it in hardware.
template <class C>
bool plain(const Rows& tokens, const Rows& factor) {
  return tokens.dtype == factor.dtype && (item_size(tokens.dtype) == sizeof(C) || fast_matmul(tokens.dtype));
}

// t [rows, columns] in this dtype; itself where it is of it.
Tensor as(ScalarType dtype, const Tensor& t) {
  if (t.scalar_type() == dtype) return t;
  int64_t rows = t.size(0), columns = t.size(1);
  Tensor result = torch::stable::new_empty(t, {rows, columns}, dtype);
  convert(rows_of(t, rows, columns, "t"), rows_of(result, rows, columns, "t"), rows, columns);
  return result;
}

// sums = in w^T (+ bias), or in w for `transposed`, rounded to the dtype of `in` on the way.
// sums: [rows, columns];  bias: [columns], of the dtype of `in`
void product(const Tensor& in, const Tensor& w, bool transposed, Tensor& sums, const OptionalTensor& bias = {}) {
  if (in.scalar_type() == sums.scalar_type()) return matmul(in, w, transposed, bias, sums);
  int64_t rows = sums.size(0), columns = sums.size(1);
  Tensor rounded = torch::stable::new_empty(in, {rows, columns});
  matmul(in, w, transposed, bias, rounded);
  convert(rows_of(rounded, rows, columns, "sums"), rows_of(sums, rows, columns, "sums"), rows, columns);
}

// out = residual + scaling * branch + shift, row by row.  residual, branch, out: [rows, n];  shift: [n] or null
template <class C>
void add_scaled(Rows residual, Rows branch, C scaling, const C* shift, Rows out, int64_t rows, int64_t n) {
  const auto& k = kernels<C>();
  torch::stable::parallel_for(0, rows, 1 + 16384 / n, [&](int64_t begin, int64_t end) {
    std::unique_ptr<C[]> sum(new C[n]), term(new C[n]), factor(new C[n]);
    std::fill_n(factor.get(), n, scaling);
    for (int64_t i = begin; i < end; ++i) {
      k.widen(residual.dtype, residual.at(i), sum.get(), n);
      k.widen(branch.dtype, branch.at(i), term.get(), n);
      k.multiply_add(term.get(), factor.get(), sum.get(), n);
      if (shift) k.add(sum.get(), shift, n);
      k.narrow(out.dtype, sum.get(), out.at(i), n);
    }
  });
}

template <class C>
void bottleneck_forward(const Tensor& x, const Tensor& residual, const Tensor& down, const OptionalTensor& down_bias,
                        const Tensor& up, const OptionalTensor& up_bias, double scaling, const std::string& name,
                        Tensor& y, Tensor& s) {
  Activation activation = activation_of(name);
  int64_t m = x.size(0), rank = down.size(0), n = up.size(0);
  auto branch = single<C>(down, up, scaling, m, 0, std::nullopt);
  Rows in = rows_of(x, m, branch.features_in, "x");
  C* shrunk = sums<C>(s, {m, rank}, "s");
  auto shift = widened<C>(up_bias, n, "up_bias"), inner = widened<C>(down_bias, rank, "down_bias");
  bool products = plain<C>(in, branch.adapters[0].a);
  if (products && x.scalar_type() != s.scalar_type() && down_bias && down_bias->scalar_type() == x.scalar_type()) {
    product(x, down, false, s, down_bias);  // so that rounding changes no sign; `middle` adds the bias again
    for (int64_t t = 0; t < m; ++t)
      for (int64_t r = 0; r < rank; ++r) shrunk[t * rank + r] -= inner[r];
  } else if (products) {
    product(x, down, false, s);
  } else {
    shrink<C>(branch, in, shrunk, rank);
  }
  Tensor hidden = middle<C>(
      s, inner.get(), [&](C* rows, int64_t, int64_t count) { kernels<C>().activate(activation, rows, count); });
  Rows out = rows_of(y, m, n, "y"), from = rows_of(residual, m, n, "residual");
  if (products && x.scalar_type() != s.scalar_type()) {
    Tensor rounded = torch::stable::new_empty(x, {m, n});
    matmul(as(x.scalar_type(), hidden), up, false, std::nullopt, rounded);
    return add_scaled<C>(from, rows_of(rounded, m, n, "y"), C(scaling), shift.get(), out, m, n);
  }
  Target<C> target{out, from, nullptr, shift.get()};
  expand<C>(branch, sums<C>(hidden, {m, rank}, "s"), rank, target, 0, n);
}

template <class C>
void bottleneck_backward(const Tensor& dy, const OptionalTensor& x, const Tensor& down, const OptionalTensor& down_bias,
                         const Tensor& up, double scaling, const std::string& name, const Tensor& s, bool serial,
                         OptionalTensor& dx, OptionalTensor& ddown, OptionalTensor& ddown_bias, OptionalTensor& dup) {
  Activation activation = activation_of(name);
  int64_t m = dy.size(0), rank = down.size(0), k = down.size(1), n = up.size(0);
  auto branch = single<C>(down, up, scaling, m, 0, std::nullopt);
  branch.adapters[0].da = rows_of(ddown, rank, k, "ddown");
  branch.adapters[0].db = rows_of(dup, n, rank, "dup");
  STD_TORCH_CHECK(!ddown || x, "ddown needs x");
  STD_TORCH_CHECK(!serial || k == n, "a serial bottleneck must be as wide as its input");
  Rows gradient = rows_of(dy, m, n, "dy"), in = rows_of(x, m, k, "x"), out = rows_of(dx, m, k, "dx");
  auto inner = widened<C>(down_bias, rank, "down_bias");
  const auto& kernel = kernels<C>();
  std::unique_ptr<C[]> sum(new C[rank]());
  if (plain<C>(gradient, branch.adapters[0].a)) {
    auto transpose = [](const Tensor& t) { return torch::stable::transpose(t, 0, 1); };
    ScalarType dtype = dy.scalar_type();
    if (dup) {
      Tensor scaled = middle<C>(s, inner.get(), [&](C* rows, int64_t, int64_t count) {
        kernel.activate(activation, rows, count);
        for (int64_t i = 0; i < count; ++i) rows[i] *= C(scaling);
      });
      // torch's product is twice as fast with few rows as with few columns
      Tensor transposed = torch::stable::new_empty(dy, {rank, n});
      matmul(transpose(as(dtype, scaled)), dy, true, std::nullopt, transposed);
      torch::stable::copy_(*dup, transpose(transposed));
    }
    if (!dx && !ddown && !ddown_bias) return;
    Tensor dhidden = torch::stable::new_empty(s, {m, rank});
    product(dy, up, true, dhidden);
    const C* factors = sums<C>(dhidden, {m, rank}, "ds");
    Tensor ds = middle<C>(s, inner.get(), [&](C* rows, int64_t first, int64_t count) {
      kernel.slope(activation, rows, count);
      for (int64_t i = 0; i < count; ++i) rows[i] *= C(scaling) * factors[first + i];
    });
    for (int64_t t = 0; ddown_bias && t < m; ++t) kernel.add(sum.get(), sums<C>(ds, {m, rank}, "ds") + t * rank, rank);
    ds = as(dtype, ds);
    if (ddown) matmul(transpose(ds), *x, true, std::nullopt, *ddown);
    if (dx) matmul(ds, down, true, serial ? OptionalTensor(dy) : std::nullopt, *dx);
  } else {
    Tensor slope = middle<C>(s, inner.get(),
                             [&](C* rows, int64_t, int64_t count) { kernel.slope(activation, rows, count); });
    Tensor factors = s;
    if (dup)
      factors = middle<C>(s, inner.get(),
                          [&](C* rows, int64_t, int64_t count) { kernel.activate(activation, rows, count); });
    backward<C>(branch, gradient, in, sums<C>(factors, {m, rank}, "s"), rank, serial ? gradient : Rows{}, out,
                {sums<C>(slope, {m, rank}, "s"), ddown_bias ? sum.get() : nullptr});
  }
  if (ddown_bias)
    kernel.narrow(dtype_of(*ddown_bias, "ddown_bias"), sum.get(), contiguous(*ddown_bias, {rank}, "ddown_bias"), rank);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyfastpeft, CPU, m) {
  m.impl("bottleneck_forward", BOX_BY_SUMS(bottleneck_forward));
  m.impl("bottleneck_backward", BOX_BY_SUMS(bottleneck_backward));
}

}  // namespace pyfastpeft
