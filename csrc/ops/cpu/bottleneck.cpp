#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <memory>
#include <string>

#include "ops/cpu/base.h"
#include "ops/cpu/lowrank.h"

namespace pyfastpeft {

namespace {

Activation activation_of(const std::string& name) {
  const char* const names[] = {"relu", "gelu", "gelu_tanh", "silu", "tanh", "identity"};
  for (int i = 0; i < 6; ++i)
    if (name == names[i]) return Activation(i);
  STD_TORCH_CHECK(false, "activation must not be '", name, "'");
}

// f(s + shift) for every token, f(row) working in place.  s: [tokens, rank]
template <class C, class F>
std::unique_ptr<C[]> middle(const C* s, const C* shift, int64_t tokens, int64_t rank, F f) {
  std::unique_ptr<C[]> out(new C[tokens * rank]);
  torch::stable::parallel_for(0, tokens, 1 + 4096 / rank, [&](int64_t begin, int64_t end) {
    C* rows = out.get() + begin * rank;
    std::copy_n(s + begin * rank, (end - begin) * rank, rows);
    for (int64_t t = begin; shift && t < end; ++t) kernels<C>().add(out.get() + t * rank, shift, rank);
    f(rows, (end - begin) * rank);
  });
  return out;
}

template <class C>
void forward(const Tensor& x, const Tensor& residual, const Tensor& down, const OptionalTensor& down_bias,
             const Tensor& up, const OptionalTensor& up_bias, double scaling, Activation activation, Tensor& y,
             Tensor& s) {
  int64_t m = x.size(0), rank = down.size(0), n = up.size(0);
  auto branch = single<C>(down, up, scaling, m, 0, std::nullopt);
  C* shrunk = sums<C>(s, {m, rank}, "s");
  auto shift = widened<C>(up_bias, n, "up_bias"), inner = widened<C>(down_bias, rank, "down_bias");
  shrink<C>(branch, rows_of(x, m, branch.features_in, "x"), shrunk, rank);
  auto hidden = middle<C>(shrunk, inner.get(), m, rank,
                          [&](C* rows, int64_t count) { kernels<C>().activate(activation, rows, count); });
  Target<C> target{rows_of(y, m, n, "y"), rows_of(residual, m, n, "residual"), nullptr, shift.get()};
  expand<C>(branch, hidden.get(), rank, target, 0, n);
}

template <class C>
void backward(const Tensor& dy, const OptionalTensor& x, const Tensor& down, const OptionalTensor& down_bias,
              const Tensor& up, double scaling, Activation activation, const Tensor& s, bool serial, OptionalTensor& dx,
              OptionalTensor& ddown, OptionalTensor& ddown_bias, OptionalTensor& dup) {
  int64_t m = dy.size(0), rank = down.size(0), k = down.size(1), n = up.size(0);
  auto branch = single<C>(down, up, scaling, m, 0, std::nullopt);
  branch.adapters[0].da = rows_of(ddown, rank, k, "ddown");
  branch.adapters[0].db = rows_of(dup, n, rank, "dup");
  STD_TORCH_CHECK(!ddown || x, "ddown needs x");
  STD_TORCH_CHECK(!serial || k == n, "a serial bottleneck must be as wide as its input");
  const C* shrunk = sums<C>(s, {m, rank}, "s");
  auto inner = widened<C>(down_bias, rank, "down_bias");
  const auto& kernel = kernels<C>();
  std::unique_ptr<C[]> hidden, slope, sum(new C[rank]);
  if (dup)
    hidden = middle<C>(shrunk, inner.get(), m, rank,
                       [&](C* rows, int64_t count) { kernel.activate(activation, rows, count); });
  if (dx || ddown || ddown_bias)
    slope = middle<C>(shrunk, inner.get(), m, rank,
                      [&](C* rows, int64_t count) { kernel.slope(activation, rows, count); });
  Rows gradient = rows_of(dy, m, n, "dy");
  backward<C>(branch, gradient, rows_of(x, m, k, "x"), hidden.get(), rank, serial ? gradient : Rows{},
              rows_of(dx, m, k, "dx"), {slope.get(), ddown_bias ? sum.get() : nullptr});
  if (ddown_bias)
    kernel.narrow(dtype_of(*ddown_bias, "ddown_bias"), sum.get(), contiguous(*ddown_bias, {rank}, "ddown_bias"), rank);
}

void bottleneck_forward(const Tensor& x, const Tensor& residual, const Tensor& down, const OptionalTensor& down_bias,
                        const Tensor& up, const OptionalTensor& up_bias, double scaling, std::string activation,
                        Tensor& y, Tensor& s) {
  auto run = x.scalar_type() == ScalarType::Double ? forward<double> : forward<float>;
  run(x, residual, down, down_bias, up, up_bias, scaling, activation_of(activation), y, s);
}

void bottleneck_backward(const Tensor& dy, const OptionalTensor& x, const Tensor& down, const OptionalTensor& down_bias,
                         const Tensor& up, double scaling, std::string activation, const Tensor& s, bool serial,
                         OptionalTensor dx, OptionalTensor ddown, OptionalTensor ddown_bias, OptionalTensor dup) {
  auto run = dy.scalar_type() == ScalarType::Double ? backward<double> : backward<float>;
  run(dy, x, down, down_bias, up, scaling, activation_of(activation), s, serial, dx, ddown, ddown_bias, dup);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyfastpeft, CPU, m) {
  m.impl("bottleneck_forward", TORCH_BOX(&bottleneck_forward));
  m.impl("bottleneck_backward", TORCH_BOX(&bottleneck_backward));
}

}  // namespace pyfastpeft
