#include "ops/cpu/adapted_linear.h"

#include <algorithm>
#include <memory>

namespace pyfastpeft {

template <class C>
void adapted_linear(const Tensor& x, const Buffer<float>& wide, const Tensor& weight, const OptionalTensor& bias,
                    const Branch<C>& branch, const C* s, int64_t s_stride, Tensor& y) {
  int64_t m = x.size(0), n = branch.features_out;
  Dtype dtype = dtype_of(x, "x");
  check_weight(weight, n, x.size(1), dtype);
  Rows out = rows_of(y, m, n, "y");
  if constexpr (sizeof(C) == 4) {
    if (upcasts(dtype)) {
      Rows shift = bias ? Rows{dtype_of(*bias, "bias"), contiguous(*bias, {n}, "bias"), 0} : Rows{};
      matmul_upcast(wide.data.get(), m, weight, false, [&](int64_t n0, int64_t columns, Rows block) {
        std::unique_ptr<float[]> bias_block(new float[columns]);
        if (shift) kernels<float>().widen(shift.dtype, shift.at(0, n0), bias_block.get(), columns);
        expand<C>(branch, s, s_stride, block, n0, n0 + columns);
        for (int64_t t = 0; t < m; ++t) {
          auto* row = reinterpret_cast<float*>(block.at(t));
          if (shift) kernels<float>().add(row, bias_block.get(), columns);
          kernels<float>().narrow(out.dtype, row, out.at(t, n0), columns);
        }
      });
      return;
    }
  }
  matmul(x, weight, false, bias, y);
  expand<C>(branch, s, s_stride, out, 0, n);
}

void input_gradient(const Buffer<float>& dy, int64_t m, const Tensor& weight, bool add, Buffer<float>& sum) {
  matmul_upcast(dy.data.get(), m, weight, true, [&](int64_t k0, int64_t columns, Rows block) {
    for (int64_t t = 0; t < m; ++t) {
      auto* to = reinterpret_cast<float*>(sum.rows().at(t, k0));
      auto* from = reinterpret_cast<const float*>(block.at(t));
      if (add) {
        kernels<float>().add(to, from, columns);
      } else {
        std::copy_n(from, columns, to);
      }
    }
  });
}

template void adapted_linear(const Tensor&, const Buffer<float>&, const Tensor&, const OptionalTensor&,
                             const Branch<float>&, const float*, int64_t, Tensor&);
template void adapted_linear(const Tensor&, const Buffer<float>&, const Tensor&, const OptionalTensor&,
                             const Branch<double>&, const double*, int64_t, Tensor&);

}  // namespace pyfastpeft
