#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstring>
#include <memory>
#include <tuple>

#include "ops/cpu/base.h"
#include "ops/cpu/lowrank.h"

namespace pyfastpeft {

namespace {

template <class C>
void forward(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& lora_A,
             const Tensor& lora_B, double scaling, double p, const OptionalTensor& seed, Tensor& y, C* shrunk) {
  int64_t m = x.size(0), k = lora_A.size(1), n = lora_B.size(0), rank = lora_A.size(0);
  auto branch = single<C>(lora_A, lora_B, scaling, m, p, seed);
  Rows in = rows_of(x, m, k, "x"), out = rows_of(y, m, n, "y");
  if (weight) check_weight(*weight, n, k, in.dtype);
  if constexpr (sizeof(C) == 4) {
    if (weight && !fast_matmul(in.dtype)) {
      Buffer<float> wide(m, k);
      convert(in, wide.rows(), m, k);
      shrink<C>(branch, wide.rows(), shrunk, rank);
      Rows shift = bias ? Rows{dtype_of(*bias, "bias"), contiguous(*bias, {n}, "bias"), 0} : Rows{};
      matmul_upcast(wide.data.get(), m, *weight, false, [&](int64_t n0, int64_t columns, Rows block) {
        std::unique_ptr<float[]> bias_block(new float[columns]);
        if (shift) kernels<float>().widen(shift.dtype, shift.at(0, n0), bias_block.get(), columns);
        expand<C>(branch, shrunk, rank, block, n0, n0 + columns);
        for (int64_t t = 0; t < m; ++t) {
          auto* row = reinterpret_cast<float*>(block.at(t));
          if (shift) kernels<float>().add(row, bias_block.get(), columns);
          kernels<float>().narrow(out.dtype, row, out.at(t, n0), columns);
        }
      });
      return;
    }
  }
  if (weight) matmul(x, *weight, false, bias, y);
  shrink<C>(branch, in, shrunk, rank);
  expand<C>(branch, shrunk, rank, out, 0, n);
}

template <class C>
void backward(const Tensor& dy, const OptionalTensor& x, const OptionalTensor& weight, const Tensor& lora_A,
              const Tensor& lora_B, double scaling, double p, const OptionalTensor& seed, const OptionalTensor& s,
              OptionalTensor& dx, OptionalTensor& dlora_A, OptionalTensor& dlora_B) {
  int64_t m = dy.size(0), k = lora_A.size(1), n = lora_B.size(0), rank = lora_A.size(0);
  auto branch = single<C>(lora_A, lora_B, scaling, m, p, seed);
  branch.adapters[0].da = rows_of(dlora_A, rank, k, "dlora_A");
  branch.adapters[0].db = rows_of(dlora_B, n, rank, "dlora_B");
  STD_TORCH_CHECK(!dlora_A || x, "dlora_A needs x");
  STD_TORCH_CHECK(!dlora_B || s, "dlora_B needs s");
  Rows gradient = rows_of(dy, m, n, "dy"), in = rows_of(x, m, k, "x"), out = rows_of(dx, m, k, "dx");
  const C* shrunk = s ? sums<C>(*s, {m, rank}, "s") : nullptr;
  if (weight) check_weight(*weight, n, k, gradient.dtype);
  if constexpr (sizeof(C) == 4) {
    if (weight && dx && !fast_matmul(gradient.dtype)) {
      Buffer<float> wide(m, n), sum(m, k);
      convert(gradient, wide.rows(), m, n);
      matmul_upcast(wide.data.get(), m, *weight, true, [&](int64_t k0, int64_t columns, Rows block) {
        for (int64_t t = 0; t < m; ++t)
          std::memcpy(sum.rows().at(t, k0), block.at(t), columns * sizeof(float));
      });
      backward<C>(branch, wide.rows(), in, shrunk, rank, sum.rows(), sum.rows());
      convert(sum.rows(), out, m, k);
      return;
    }
  }
  if (weight && dx) matmul(dy, *weight, true, std::nullopt, *dx);
  backward<C>(branch, gradient, in, shrunk, rank, weight ? out : Rows{}, out);
}

void lora_forward(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& lora_A,
                  const Tensor& lora_B, double scaling, double dropout_p, const OptionalTensor& seed, Tensor& y,
                  Tensor& s) {
  int64_t m = x.size(0), rank = lora_A.size(0);
  if (x.scalar_type() == ScalarType::Double) {
    forward(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed, y, sums<double>(s, {m, rank}, "s"));
  } else {
    forward(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed, y, sums<float>(s, {m, rank}, "s"));
  }
}

void lora_backward(const Tensor& dy, const OptionalTensor& x, const OptionalTensor& weight, const Tensor& lora_A,
                   const Tensor& lora_B, double scaling, double dropout_p, const OptionalTensor& seed,
                   const OptionalTensor& s, OptionalTensor dx, OptionalTensor dlora_A, OptionalTensor dlora_B) {
  auto run = dy.scalar_type() == ScalarType::Double ? backward<double> : backward<float>;
  run(dy, x, weight, lora_A, lora_B, scaling, dropout_p, seed, s, dx, dlora_A, dlora_B);
}

// Whether a call is an ordinary one.  x: [..., K];  lora_A: [r, K];  lora_B: [N, r]
template <class C>
bool ordinary(const Tensor& x, const Rows& in, const Tensor& lora_A, const Tensor& lora_B, int64_t n) {
  if (!in || lora_A.dim() != 2 || lora_A.numel() == 0 || !summed_in<C>(in.dtype, lora_A, lora_B)) return false;
  int64_t rank = lora_A.size(0);
  return shaped(lora_A, {rank, x.size(-1)}) && shaped(lora_B, {n, rank});
}

// y [..., N], or none.  s: where given, made [M, r] for the backward pass.
template <class C>
OptionalTensor call(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& lora_A,
                    const Tensor& lora_B, double scaling, OptionalTensor* s) {
  Rows in = separate_rows(x);
  if (weight.dim() != 2 || weight.numel() == 0 || float_dtype(weight) != in.dtype) return {};
  int64_t n = weight.size(0), k = weight.size(1);
  if (!ordinary<C>(x, in, lora_A, lora_B, n) || x.size(-1) != k) return {};
  if (bias && !(on_cpu(*bias) && float_dtype(*bias) == in.dtype && shaped(*bias, {n}))) return {};
  int64_t m = x.numel() / k, rank = lora_A.size(0);
  Tensor y = empty_rows(x, n), out = as_matrix(y, m, n, n);
  std::unique_ptr<C[]> own(s ? nullptr : new C[m * rank]);
  if (s) *s = torch::stable::new_empty(x, {m, rank}, sizeof(C) == 8 ? ScalarType::Double : ScalarType::Float);
  C* shrunk = s ? sums<C>(**s, {m, rank}, "s") : own.get();
  forward(as_matrix(x, m, k, in.stride), weight, bias, lora_A, lora_B, scaling, 0, {}, out, shrunk);
  return y;
}

template <class C>
bool infer_in_place(const Tensor& y, const Tensor& x, const Tensor& lora_A, const Tensor& lora_B, double scaling) {
  Rows in = separate_rows(x), out = separate_rows(y);
  if (!out || out.dtype != in.dtype) return false;
  int64_t n = y.size(-1), m = y.numel() / n;
  if (!ordinary<C>(x, in, lora_A, lora_B, n) || !same_lead(x, y)) return false;
  for (const Tensor* other : {&x, &lora_A, &lora_B})
    if (!apart(out, m, n, *other)) return false;
  auto branch = single<C>(lora_A, lora_B, scaling, m, 0, {});
  int64_t rank = lora_A.size(0);
  std::unique_ptr<C[]> shrunk(new C[m * rank]);
  shrink<C>(branch, in, shrunk.get(), rank);
  expand<C>(branch, shrunk.get(), rank, out, 0, n);
  return true;
}

OptionalTensor lora_call(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& lora_A,
                         const Tensor& lora_B, double scaling, OptionalTensor* s) {
  if (!on_cpu(x) || !on_cpu(weight) || !on_cpu(lora_A) || !on_cpu(lora_B)) return {};
  auto run = x.scalar_type() == ScalarType::Double ? call<double> : call<float>;
  return run(x, weight, bias, lora_A, lora_B, scaling, s);
}

OptionalTensor lora_inference(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& lora_A,
                              const Tensor& lora_B, double scaling) {
  return lora_call(x, weight, bias, lora_A, lora_B, scaling, nullptr);
}

std::tuple<OptionalTensor, OptionalTensor> lora_training(const Tensor& x, const Tensor& weight,
                                                         const OptionalTensor& bias, const Tensor& lora_A,
                                                         const Tensor& lora_B, double scaling) {
  OptionalTensor s, y = lora_call(x, weight, bias, lora_A, lora_B, scaling, &s);
  return {y, s};
}

bool lora_inference_in_place(const Tensor& y, const Tensor& x, const Tensor& lora_A, const Tensor& lora_B,
                         double scaling) {
  if (!on_cpu(y) || !on_cpu(x) || !on_cpu(lora_A) || !on_cpu(lora_B)) return false;
  auto run = x.scalar_type() == ScalarType::Double ? infer_in_place<double> : infer_in_place<float>;
  return run(y, x, lora_A, lora_B, scaling);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyfastpeft, CPU, m) {
  m.impl("lora_forward", TORCH_BOX(&lora_forward));
  m.impl("lora_backward", TORCH_BOX(&lora_backward));
}

STABLE_TORCH_LIBRARY_IMPL(pyfastpeft, CompositeExplicitAutograd, m) {
  m.impl("lora_inference", TORCH_BOX(&lora_inference));
  m.impl("lora_training", TORCH_BOX(&lora_training));
  m.impl("lora_inference_", TORCH_BOX(&lora_inference_in_place));
}

}  // namespace pyfastpeft
