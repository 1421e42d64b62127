#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <tuple>
#include <vector>

#include "ops/cpu/adapted_linear.h"
#include "ops/cpu/by_sums.h"
#include "ops/lora_layers.h"

namespace pyfastpeft {

namespace {

// The half of a branch that all layers share, and the other half of one layer's.
template <class C>
Branch<C> shrinking(const Tensor& lora_A, int64_t tokens, double p, const OptionalTensor& seed) {
  int64_t rank = lora_A.size(0), k = lora_A.size(1);
  return {{{rows_of(lora_A, rank, k, "lora_A"), Rows{}, rank, 1, {nullptr, tokens}}}, k, 0, dropout_of(p, seed)};
}

template <class C>
Branch<C> expanding(const LoraLayer& layer, Dtype dtype, int64_t tokens) {
  Rows b = rows_of(layer.lora_B, layer.features(), layer.rank(), "lora_B");
  check_adapters<C>(dtype, b.dtype);
  return {{{Rows{}, b, layer.rank(), layer.scaling, {nullptr, tokens}}}, 0, layer.features()};
}

void check_ranks(const std::vector<LoraLayer>& layers, int64_t rank) {
  int64_t sum = 0;
  for (const LoraLayer& layer : layers) sum += layer.rank();
  STD_TORCH_CHECK(sum == rank, "the rows of lora_A must be as many as the columns of every lora_B");
}

// s = drop(x) A^T;  y = x W^T + bias + scaling * s B^T for every layer and its columns of s; without W, y += the rest.
// lora_A: [R, K], R the sum of all ranks;  ys: of every layer [M, N], out;  s: [M, R], out
template <class C>
void forward(const Tensor& x, const std::vector<LoraLayer>& layers, const Tensor& lora_A, double p,
             const OptionalTensor& seed, const std::vector<Tensor>& ys, C* s) {
  int64_t m = x.size(0), k = lora_A.size(1), ranks = lora_A.size(0);
  check_ranks(layers, ranks);
  auto stack = shrinking<C>(lora_A, m, p, seed);
  Rows in = rows_of(x, m, k, "x");
  bool upcast = layers[0].weight && upcasts(in.dtype);
  Buffer<float> wide(upcast ? m : 0, k);
  if (upcast) convert(in, wide.rows(), m, k);
  shrink<C>(stack, upcast ? wide.rows() : in, s, ranks);
  for (size_t i = 0; i < layers.size(); ++i) {
    const LoraLayer& layer = layers[i];
    int64_t n = layer.features();
    auto branch = expanding<C>(layer, stack.adapters[0].a.dtype, m);
    Tensor y = ys[i];
    if (layer.weight) {
      adapted_linear<C>(x, wide, *layer.weight, layer.bias, branch, s, ranks, y);
    } else {
      expand<C>(branch, s, ranks, rows_of(y, m, n, "y"), 0, n);
    }
    s += layer.rank();
  }
}

// ds = scaling * dy B;  dB = scaling * dy^T s for every layer and its columns of ds and s;  dA = ds^T drop(x);
// dx = the sum of dy W + drop'(ds A), without W the second term alone: what is wanted of these.
// dys: of every layer [M, N];  lora_A, s as in forward;  out: dx [M, K], dlora_A [R, K], dlora_Bs of every layer or none
template <class C>
void backward(const std::vector<Tensor>& dys, const OptionalTensor& x, const std::vector<LoraLayer>& layers,
              const Tensor& lora_A, double p, const OptionalTensor& seed, const OptionalTensor& s, OptionalTensor& dx,
              OptionalTensor& dlora_A, const std::vector<Tensor>& dlora_Bs) {
  int64_t m = dys[0].size(0), k = lora_A.size(1), ranks = lora_A.size(0), first = 0;
  check_ranks(layers, ranks);
  STD_TORCH_CHECK(!dlora_A || x, "dlora_A needs x");
  STD_TORCH_CHECK(dlora_Bs.empty() || s, "dlora_B needs s");
  auto stack = shrinking<C>(lora_A, m, p, seed);
  stack.adapters[0].da = rows_of(dlora_A, ranks, k, "dlora_A");
  Rows in = rows_of(x, m, k, "x"), out = rows_of(dx, m, k, "dx");
  const C* shrunk = s ? sums<C>(*s, {m, ranks}, "s") : nullptr;
  bool base = dx && layers[0].weight;
  bool upcast = base && upcasts(dtype_of(dys[0], "dy"));
  Buffer<float> sum(upcast ? m : 0, k);
  Buffer<C> ds(dx || dlora_A ? m : 0, ranks);
  for (size_t i = 0; i < layers.size(); ++i) {
    const LoraLayer& layer = layers[i];
    int64_t n = layer.features();
    auto branch = expanding<C>(layer, stack.adapters[0].a.dtype, m);
    if (!dlora_Bs.empty()) branch.adapters[0].db = rows_of(dlora_Bs[i], n, layer.rank(), "dlora_B");
    Rows gradient = rows_of(dys[i], m, n, "dy");
    if (layer.weight) check_weight(*layer.weight, n, k, gradient.dtype);
    Buffer<float> wide(upcast ? m : 0, n);
    if (upcast) {
      convert(gradient, wide.rows(), m, n);
      gradient = wide.rows();
      input_gradient(wide, m, *layer.weight, i > 0, sum);
    } else if (base) {
      matmul(dys[i], *layer.weight, true, i == 0 ? std::nullopt : dx, *dx);
    }
    std::vector<Shrunk<C>> own;
    if (dx || dlora_A) own.push_back({ds.data.get() + first, ranks});
    expand_backward<C>(branch, gradient, shrunk ? shrunk + first : nullptr, ranks, own);
    first += layer.rank();
  }
  if (!dx && !dlora_A) return;
  Rows to = upcast ? sum.rows() : out;
  shrink_backward<C>(stack, {{ds.data.get(), ranks}}, in, base ? to : Rows{}, to);
  if (upcast) convert(to, out, m, k);
}

template <class C>
void lora_forward(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& lora_A,
                  const Tensor& lora_B, double scaling, double p, const OptionalTensor& seed, Tensor& y, Tensor& s) {
  C* shrunk = sums<C>(s, {x.size(0), lora_A.size(0)}, "s");
  forward(x, {{weight, bias, lora_B, scaling}}, lora_A, p, seed, {y}, shrunk);
}

template <class C>
void lora_backward(const Tensor& dy, const OptionalTensor& x, const OptionalTensor& weight, const Tensor& lora_A,
                   const Tensor& lora_B, double scaling, double p, const OptionalTensor& seed, const OptionalTensor& s,
                   OptionalTensor& dx, OptionalTensor& dlora_A, const OptionalTensor& dlora_B) {
  std::vector<Tensor> dlora_Bs;
  if (dlora_B) dlora_Bs.push_back(*dlora_B);
  backward<C>({dy}, x, {{weight, std::nullopt, lora_B, scaling}}, lora_A, p, seed, s, dx, dlora_A, dlora_Bs);
}

template <class C>
void lora_group_forward(const Tensor& x, const std::vector<Tensor>& weights, const std::vector<OptionalTensor>& biases,
                        const Tensor& lora_A, const std::vector<Tensor>& lora_Bs, const std::vector<double>& scalings,
                        double p, const OptionalTensor& seed, const std::vector<Tensor>& ys, Tensor& s) {
  auto layers = lora_layers(weights, biases, lora_Bs, scalings);
  STD_TORCH_CHECK(ys.size() == layers.size(), "ys must hold one tensor for each layer");
  forward(x, layers, lora_A, p, seed, ys, sums<C>(s, {x.size(0), lora_A.size(0)}, "s"));
}

template <class C>
void lora_group_backward(const std::vector<Tensor>& dys, const OptionalTensor& x, const std::vector<Tensor>& weights,
                         const Tensor& lora_A, const std::vector<Tensor>& lora_Bs, const std::vector<double>& scalings,
                         double p, const OptionalTensor& seed, const OptionalTensor& s, OptionalTensor& dx,
                         OptionalTensor& dlora_A, const std::vector<Tensor>& dlora_Bs) {
  auto layers = lora_layers(weights, {}, lora_Bs, scalings);
  STD_TORCH_CHECK(dys.size() == layers.size() && (dlora_Bs.empty() || dlora_Bs.size() == layers.size()),
                  "dys and dlora_Bs must hold one tensor for each layer");
  backward<C>(dys, x, layers, lora_A, p, seed, s, dx, dlora_A, dlora_Bs);
}

// (dx, dlora_A, dlora_B), of those that are wanted; none where dy or x is out of the ordinary.
// dy: [..., N];  x: [..., K];  dx: [..., K], out
template <class C>
std::tuple<OptionalTensor, OptionalTensor, OptionalTensor> lora_gradients(
    const Tensor& dy, const OptionalTensor& x, const OptionalTensor& weight, const Tensor& lora_A, const Tensor& lora_B,
    double scaling, double p, const OptionalTensor& seed, const OptionalTensor& s, bool need_x, bool need_A,
    bool need_B) {
  if (!on_cpu(dy)) return {};
  Rows gradient = separate_rows(dy), in = x ? separate_rows(*x) : Rows{};
  if (!gradient || (x && !in) || !sums_in<C>(gradient.dtype)) return {};
  int64_t n = lora_B.size(0), k = lora_A.size(1), m = dy.numel() / n;
  OptionalTensor rows, dx, out, dlora_A, dlora_B;
  std::vector<Tensor> dlora_Bs;
  if (x) rows = as_matrix(*x, m, k, in.stride);
  if (need_x) dx = empty_rows(dy, k), out = as_matrix(*dx, m, k, k);
  if (need_A) dlora_A = torch::stable::new_empty(lora_A, lora_A.sizes());
  if (need_B) dlora_Bs.push_back(*(dlora_B = torch::stable::new_empty(lora_B, lora_B.sizes())));
  backward<C>({as_matrix(dy, m, n, gradient.stride)}, rows, {{weight, std::nullopt, lora_B, scaling}}, lora_A, p, seed,
              s, out, dlora_A, dlora_Bs);
  return {dx, dlora_A, dlora_B};
}

// y [..., N], or none where the call is out of the ordinary.  s: where given, made [M, r] for the backward pass.
template <class C>
OptionalTensor call(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& lora_A,
                    const Tensor& lora_B, double scaling, OptionalTensor* s) {
  if (!on_cpu(x) || !on_cpu(lora_A) || !on_cpu(lora_B) || !std::isfinite(scaling)) return {};
  Rows in = separate_rows(x);
  if (!linear(x, in, weight, bias) || !low_rank<C>(x, in, lora_A, lora_B, weight.size(0))) return {};
  int64_t n = weight.size(0), k = weight.size(1), m = x.numel() / k, rank = lora_A.size(0);
  Tensor y = empty_rows(x, n), out = as_matrix(y, m, n, n);
  std::unique_ptr<C[]> own(s ? nullptr : new C[m * rank]);
  if (s) *s = torch::stable::new_empty(x, {m, rank}, native_scalar<C>);
  C* shrunk = s ? sums<C>(**s, {m, rank}, "s") : own.get();
  forward(as_matrix(x, m, k, in.stride), {{weight, bias, lora_B, scaling}}, lora_A, 0, {}, {out}, shrunk);
  return y;
}

template <class C>
OptionalTensor lora_call(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& lora_A,
                         const Tensor& lora_B, double scaling) {
  return call<C>(x, weight, bias, lora_A, lora_B, scaling, nullptr);
}

template <class C>
std::tuple<OptionalTensor, OptionalTensor> lora_call_with_s(const Tensor& x, const Tensor& weight,
                                                            const OptionalTensor& bias, const Tensor& lora_A,
                                                            const Tensor& lora_B, double scaling) {
  OptionalTensor s, y = call<C>(x, weight, bias, lora_A, lora_B, scaling, &s);
  return {y, s};
}

template <class C>
bool lora_call_(const Tensor& y, const Tensor& x, const Tensor& lora_A, const Tensor& lora_B, double scaling) {
  if (!on_cpu(y) || !on_cpu(x) || !on_cpu(lora_A) || !on_cpu(lora_B) || !std::isfinite(scaling)) return false;
  Rows in = separate_rows(x), out = separate_rows(y);
  if (!out || out.dtype != in.dtype) return false;
  int64_t n = y.size(-1), m = y.numel() / n;
  if (!low_rank<C>(x, in, lora_A, lora_B, n) || !same_lead(x, y)) return false;
  for (const Tensor* other : {&x, &lora_A, &lora_B})
    if (!apart(out, m, n, *other)) return false;
  auto branch = single<C>(lora_A, lora_B, scaling, m, 0, {});
  int64_t rank = lora_A.size(0);
  std::unique_ptr<C[]> shrunk(new C[m * rank]);
  shrink<C>(branch, in, shrunk.get(), rank);
  expand<C>(branch, shrunk.get(), rank, out, 0, n);
  return true;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyfastpeft, CPU, m) {
  m.impl("lora_forward", BOX_BY_SUMS(lora_forward));
  m.impl("lora_backward", BOX_BY_SUMS(lora_backward));
  m.impl("lora_group_forward", BOX_BY_SUMS(lora_group_forward));
  m.impl("lora_group_backward", BOX_BY_SUMS(lora_group_backward));
}

STABLE_TORCH_LIBRARY_IMPL(pyfastpeft, CompositeExplicitAutograd, m) {
  m.impl("lora_call", BOX_BY_SUMS(lora_call));
  m.impl("lora_call_with_s", BOX_BY_SUMS(lora_call_with_s));
  m.impl("lora_gradients", BOX_BY_SUMS(lora_gradients));
  m.impl("lora_call_", BOX_BY_SUMS(lora_call_));
}

}  // namespace pyfastpeft
