#include <torch/csrc/stable/library.h>

#include <cstring>

#include "ops/cpu/base.h"
#include "ops/cpu/lowrank.h"

namespace pyfastpeft {

namespace {

template <class C>
void forward(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& lora_A,
             const Tensor& lora_B, double scaling, double p, const OptionalTensor& seed, Tensor& y, Tensor& s) {
  int64_t m = x.size(0), k = lora_A.size(1), n = lora_B.size(0), rank = lora_A.size(0);
  auto branch = single<C>(lora_A, lora_B, scaling, m, p, seed);
  Rows in = rows_of(x, m, k, "x"), out = rows_of(y, m, n, "y");
  C* shrunk = sums<C>(s, {m, rank}, "s");
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
  auto run = x.scalar_type() == ScalarType::Double ? forward<double> : forward<float>;
  run(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed, y, s);
}

void lora_backward(const Tensor& dy, const OptionalTensor& x, const OptionalTensor& weight, const Tensor& lora_A,
                   const Tensor& lora_B, double scaling, double dropout_p, const OptionalTensor& seed,
                   const OptionalTensor& s, OptionalTensor dx, OptionalTensor dlora_A, OptionalTensor dlora_B) {
  auto run = dy.scalar_type() == ScalarType::Double ? backward<double> : backward<float>;
  run(dy, x, weight, lora_A, lora_B, scaling, dropout_p, seed, s, dx, dlora_A, dlora_B);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyfastpeft, CPU, m) {
  m.impl("lora_forward", TORCH_BOX(&lora_forward));
  m.impl("lora_backward", TORCH_BOX(&lora_backward));
}

}  // namespace pyfastpeft
