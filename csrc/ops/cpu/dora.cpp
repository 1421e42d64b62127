#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <tuple>

#include "ops/cpu/adapted_linear.h"
#include "ops/cpu/by_sums.h"
#include "ops/cpu/scale.h"
#include "ops/cpu/tasks.h"

namespace pyfastpeft {

namespace {

template <class C>
void dora_norm(const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B, double scaling,
               const OptionalTensor& weight_norm_squared, Tensor& norm) {
  int64_t n = weight.size(0), k = weight.size(1), rank = lora_A.size(0);
  Rows w = rows_of(weight, n, k, "weight"), a = rows_of(lora_A, rank, k, "lora_A"), b = rows_of(lora_B, n, rank, "lora_B");
  check_adapters<C>(a.dtype, b.dtype);
  C* out = sums<C>(norm, {n}, "norm");
  const C* squares = weight_norm_squared ? sums<C>(*weight_norm_squared, {n}, "weight_norm_squared") : nullptr;
  const auto& kernel = kernels<C>();
  Buffer<C> gram(rank, rank);
  shrink<C>({{{a, {}, rank, 1, {nullptr, rank}}}, k, rank}, a, gram.data.get(), rank);

  // lora_A in a panel, transposed: [k][width], with zeros up to whole vectors; none where half of it would be zeros.
  bool narrow = 2 * rank <= kernel.lanes;
  int64_t width = narrow ? rank : blocks(rank, kernel.lanes) * kernel.lanes;
  Buffer<C> panel(narrow ? 0 : k, width);
  torch::stable::parallel_for(0, narrow ? 0 : k, 1 + SERIAL_WORK / width, [&](int64_t begin, int64_t end) {
    pack<C>({a.dtype, a.at(0, begin), a.stride}, rank, end - begin, nullptr, panel.data.get() + begin * width, width);
  });

  // Rows of the weight that stay in the first cache for their products and their squares.
  constexpr int64_t BLOCK = 6, DEPTH = 4096 / sizeof(C);
  share_out(blocks(n, BLOCK), 1, n * k * rank < SERIAL_WORK, [&](auto take, auto) {
    Buffer<C> stage(BLOCK, std::min(k, DEPTH)), cross(BLOCK, width), part(BLOCK, width), own(BLOCK, rank);
    const C *in[BLOCK], *factors[BLOCK];
    C *products[BLOCK], *parts[BLOCK], *own_products[BLOCK];
    for (int64_t j = 0; j < BLOCK; ++j) {
      products[j] = cross.data.get() + j * width;
      parts[j] = part.data.get() + j * width;
      own_products[j] = own.data.get() + j * rank;
    }
    for (Run run; (run = take()).count;) {
      int64_t first = run.begin * BLOCK, count = std::min(BLOCK, n - first), size = item_size(w.dtype);
      C square[BLOCK] = {};
      for (int64_t p = 0; p < k; p += DEPTH) {
        int64_t depth = std::min(DEPTH, k - p), rest = k - p - depth;
        for (int64_t j = 0; j < count; ++j) {
          in[j] = reinterpret_cast<const C*>(w.at(first + j, p));
          if (w.dtype == native<C>) continue;
          kernel.widen(w.dtype, in[j], stage.data.get() + j * depth, depth);
          in[j] = stage.data.get() + j * depth;
        }
        if (narrow) {
          kernel.dot(in, 0, count, a.dtype, a.at(0, p), a.stride, rank, depth, p ? parts : products);
          for (int64_t j = 0; p && j < count; ++j) kernel.add(products[j], parts[j], rank);
        } else {
          Upcoming next(rest ? w.at(first, p + depth) : w.at(first + count), w.stride * size,
                        rest ? count : std::min(BLOCK, n - first - count), std::min(DEPTH, rest ? rest : k) * size,
                        blocks(width, kernel.width) * (depth / Next::STEPS));
          const C* c = panel.data.get() + p * width;
          kernel.axpy(in, 1, count, c, width, depth, products, width, p > 0, {0, 0, &next});
        }
        for (int64_t j = 0; !squares && j < count; ++j) {
          C sum, *to = &sum;
          kernel.dot(in + j, 0, 1, native<C>, in[j], depth, 1, depth, &to);
          square[j] += sum;
        }
      }
      for (int64_t j = 0; j < count; ++j) factors[j] = row_of(b, first + j, rank, parts[j]);
      kernel.axpy(factors, 1, count, gram.data.get(), rank, rank, own_products, rank, false, {});
      for (int64_t j = 0; j < count; ++j) {
        C total = squares ? squares[first + j] : square[j];
        for (int64_t r = 0; r < rank; ++r)
          total += C(scaling) * factors[j][r] * (2 * products[j][r] + C(scaling) * own_products[j][r]);
        out[first + j] = std::sqrt(total < 0 ? C(0) : total);
      }
    }
  });
}

template <class C>
void dora_forward(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& lora_A,
                  const Tensor& lora_B, const Tensor& scale, double scaling, double p, const OptionalTensor& seed,
                  Tensor& y, Tensor& s, const OptionalTensor& unscaled) {
  int64_t m = x.size(0), k = lora_A.size(1), n = lora_B.size(0), rank = lora_A.size(0);
  auto branch = single<C>(lora_A, lora_B, scaling, m, p, seed);
  Rows in = rows_of(x, m, k, "x"), out = rows_of(y, m, n, "y"), product = rows_of(unscaled, m, n, "unscaled");
  C* shrunk = sums<C>(s, {m, rank}, "s");
  check_weight(weight, n, k, in.dtype);
  STD_TORCH_CHECK(!unscaled || product.dtype == out.dtype, "unscaled must be of y's dtype");
  auto shift = widened<C>(bias, n, "bias");
  Target<C> target{out, {}, sums<C>(scale, {n}, "scale"), shift.get(), product};
  if constexpr (sizeof(C) == 4) {
    if (upcasts(in.dtype)) {
      Buffer<float> wide(m, k);
      convert(in, wide.rows(), m, k);
      shrink<C>(branch, wide.rows(), shrunk, rank);
      matmul_upcast(wide.data.get(), m, weight, false, [&](int64_t n0, int64_t columns, Rows block) {
        auto part = target.columns(n0);
        part.from = block;
        expand<C>(branch, shrunk, rank, part, n0, n0 + columns);
      });
      return;
    }
  }
  Tensor base = unscaled ? *unscaled : y;
  matmul(x, weight, false, std::nullopt, base);
  shrink<C>(branch, in, shrunk, rank);
  target.from = unscaled ? product : out;
  expand<C>(branch, shrunk, rank, target, 0, n);
}

template <class C>
void dora_backward(const Tensor& dy, const OptionalTensor& x, const Tensor& weight, const Tensor& lora_A,
                   const Tensor& lora_B, const Tensor& scale, double scaling, double p, const OptionalTensor& seed,
                   const OptionalTensor& s, const OptionalTensor& unscaled, OptionalTensor& dx,
                   OptionalTensor& dlora_A, OptionalTensor& dlora_B, const OptionalTensor& dscale) {
  int64_t m = dy.size(0), k = lora_A.size(1), n = lora_B.size(0), rank = lora_A.size(0);
  const auto& kernel = kernels<C>();
  STD_TORCH_CHECK(!dlora_A || x, "dlora_A needs x");
  STD_TORCH_CHECK(!dlora_B || s, "dlora_B needs s");
  STD_TORCH_CHECK(!dscale || unscaled, "dscale needs unscaled");
  Rows gradient = rows_of(dy, m, n, "dy"), in = rows_of(x, m, k, "x"), out = rows_of(dx, m, k, "dx");
  Rows product = rows_of(unscaled, m, n, "unscaled"), db = rows_of(dlora_B, n, rank, "dlora_B"), sum;
  check_weight(weight, n, k, gradient.dtype);
  const C *factor = sums<C>(scale, {n}, "scale"), *shrunk = s ? sums<C>(*s, {m, rank}, "s") : nullptr;
  if (dscale) sum = {dtype_of(*dscale, "dscale"), reinterpret_cast<char*>(sums<C>(*dscale, {n}, "dscale")), 0};

  // What is low-rank meets the scale in B and dB, so that it is not rounded to dy's dtype on the way.
  auto branch = single<C>(lora_A, lora_B, scaling, m, p, seed);
  Adapter& adapter = branch.adapters[0];
  Buffer<C> b(n, rank), unscaled_db(dlora_B ? n : 0, rank);
  kernel.copy(adapter.b.dtype, adapter.b.data, adapter.b.stride, n, rank, factor, b.data.get(), rank);
  adapter.b = b.rows();
  adapter.da = rows_of(dlora_A, rank, k, "dlora_A");
  if (dlora_B) adapter.db = unscaled_db.rows();

  auto scaled = [&](Rows du) { scale_and_reduce<C>(gradient, product, factor, du, sum, m, n); };
  auto low_rank = [&](Rows from, Rows to) { backward<C>(branch, gradient, in, shrunk, rank, from, to); };
  bool own = dx && sizeof(C) == 4 && prefers_own_matmul(dy, weight, *dx);  // which scales what it packs
  if (!dx || own) {
    if (dscale) scaled({});
    if constexpr (sizeof(C) == 4)
      if (own) own_matmul(dy, weight, true, std::nullopt, *dx, factor);
    low_rank(out, out);
  } else if (upcasts(gradient.dtype)) {
    if constexpr (sizeof(C) == 4) {
      Buffer<float> du(m, n), whole(m, k);
      scaled(du.rows());
      input_gradient(du, m, weight, false, whole);
      low_rank(whole.rows(), whole.rows());
      convert(whole.rows(), out, m, k);
    }
  } else {
    Tensor du = torch::stable::new_empty(dy, {m, n});
    scaled(rows_of(du, m, n, "du"));
    matmul(du, weight, true, std::nullopt, *dx);
    low_rank(out, out);
  }
  if (!db) return;
  kernel.copy(native<C>, unscaled_db.data.get(), rank, n, rank, factor, unscaled_db.data.get(), rank);
  for (int64_t i = 0; i < n; ++i) kernel.narrow(db.dtype, unscaled_db.data.get() + i * rank, db.at(i), rank);
}

// (y, s, unscaled, scale, norm); none where the call is out of the ordinary.
// y: [..., N];  s: [M, r];  unscaled: [M, N], where it is wanted;  scale = magnitude / norm, norm: [N]
template <class C>
std::tuple<OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor> dora_call(
    const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& lora_A, const Tensor& lora_B,
    const Tensor& magnitude, double scaling, bool keep_unscaled) {
  if (!on_cpu(x) || !on_cpu(lora_A) || !on_cpu(lora_B) || !on_cpu(magnitude)) return {};
  if (!std::isfinite(scaling)) return {};
  Rows in = separate_rows(x);
  auto dtype = float_dtype(magnitude);
  if (!linear(x, in, weight, bias) || !low_rank<C>(x, in, lora_A, lora_B, weight.size(0))) return {};
  int64_t n = weight.size(0), k = weight.size(1), m = x.numel() / k, rank = lora_A.size(0);
  if (weight.stride(1) != 1 || !dtype || !sums_in<C>(*dtype) || !shaped(magnitude, {n})) return {};
  auto made = [&](std::initializer_list<int64_t> shape) { return torch::stable::new_empty(x, shape, native_scalar<C>); };
  Tensor y = empty_rows(x, n), out = as_matrix(y, m, n, n), s = made({m, rank}), length = made({n}), scale = made({n});
  OptionalTensor unscaled;
  if (keep_unscaled) unscaled = torch::stable::new_empty(x, {m, n});
  dora_norm<C>(weight, lora_A, lora_B, scaling, {}, length);
  auto wanted = widened<C>(magnitude, n, "magnitude");
  const C* found = sums<C>(length, {n}, "norm");
  for (int64_t i = 0; i < n; ++i) wanted[i] /= found[i];
  std::copy_n(wanted.get(), n, sums<C>(scale, {n}, "scale"));
  dora_forward<C>(as_matrix(x, m, k, in.stride), weight, bias, lora_A, lora_B, scale, scaling, 0, {}, out, s, unscaled);
  return {y, s, unscaled, scale, length};
}

// (dx, dlora_A, dlora_B, dmagnitude), of those that are wanted; none where dy or x is out of the ordinary.
// dy: [..., N];  x: [..., K];  dx: [..., K], dmagnitude: [N], out
template <class C>
std::tuple<OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor> dora_gradients(
    const Tensor& dy, const OptionalTensor& x, const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B,
    const Tensor& scale, const Tensor& norm, double scaling, double p, const OptionalTensor& seed,
    const OptionalTensor& s, const OptionalTensor& unscaled, bool need_x, bool need_A, bool need_B,
    bool need_magnitude) {
  if (!on_cpu(dy)) return {};
  Rows gradient = separate_rows(dy), in = x ? separate_rows(*x) : Rows{};
  if (!gradient || (x && !in) || !sums_in<C>(gradient.dtype)) return {};
  int64_t n = lora_B.size(0), k = lora_A.size(1), m = dy.numel() / n;
  OptionalTensor rows, dx, out, dlora_A, dlora_B, dmagnitude;
  if (x) rows = as_matrix(*x, m, k, in.stride);
  if (need_x) dx = empty_rows(dy, k), out = as_matrix(*dx, m, k, k);
  if (need_A) dlora_A = torch::stable::new_empty(lora_A, lora_A.sizes());
  if (need_B) dlora_B = torch::stable::new_empty(lora_B, lora_B.sizes());
  if (need_magnitude) dmagnitude = torch::stable::new_empty(scale, {n});
  dora_backward<C>(as_matrix(dy, m, n, gradient.stride), rows, weight, lora_A, lora_B, scale, scaling, p, seed, s,
                   unscaled, out, dlora_A, dlora_B, dmagnitude);
  if (need_magnitude) {
    C* to = sums<C>(*dmagnitude, {n}, "dmagnitude");
    const C* lengths = sums<C>(norm, {n}, "norm");
    for (int64_t i = 0; i < n; ++i) to[i] /= lengths[i];
  }
  return {dx, dlora_A, dlora_B, dmagnitude};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyfastpeft, CPU, m) {
  m.impl("dora_norm", BOX_BY_SUMS(dora_norm));
  m.impl("dora_forward", BOX_BY_SUMS(dora_forward));
  m.impl("dora_backward", BOX_BY_SUMS(dora_backward));
}

STABLE_TORCH_LIBRARY_IMPL(pyfastpeft, CompositeExplicitAutograd, m) {
  m.impl("dora_call", BOX_BY_SUMS(dora_call));
  m.impl("dora_gradients", BOX_BY_SUMS(dora_gradients));
}

}  // namespace pyfastpeft
