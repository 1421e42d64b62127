#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <memory>

#include "ops/cpu/base.h"

namespace pyfastpeft {

namespace {

constexpr int64_t CHUNKS = 32;  // partial sums of the reduction over rows: fixed, so that threads do not change it

// Row i of x as C: where it lies if it is of that type, else in `stage`.
template <class C>
const C* row_of(const Rows& x, int64_t i, int64_t n, C* stage) {
  if (item_size(x.dtype) == sizeof(C)) return reinterpret_cast<const C*>(x.at(i));
  kernels<C>().widen(x.dtype, x.at(i), stage, n);
  return stage;
}

// Row i of out = x * l.
template <class C>
void scale_row(const C* x, const C* l, const Rows& out, int64_t i, int64_t n, C* stage) {
  if (item_size(out.dtype) == sizeof(C)) {
    kernels<C>().multiply(x, l, reinterpret_cast<C*>(out.at(i)), n);
  } else {
    kernels<C>().multiply(x, l, stage, n);
    kernels<C>().narrow(out.dtype, stage, out.at(i), n);
  }
}

// out[i] = in[i] * l, row by row.  in, out: [rows, n];  l: [n]
template <class C>
void scale(Rows in, const C* l, Rows out, int64_t rows, int64_t n) {
  torch::stable::parallel_for(0, rows, 1 + 16384 / n, [&](int64_t begin, int64_t end) {
    std::unique_ptr<C[]> stage(new C[n]);
    for (int64_t i = begin; i < end; ++i)
      scale_row(row_of(in, i, n, stage.get()), l, out, i, n, stage.get());
  });
}

// In one pass over g and v: out[i] = g[i] * l and dl = sum over rows of g * v, each where wanted.
// g, v, out: [rows, n];  l, dl: [n]
template <class C>
void scale_and_reduce(Rows g, Rows v, const C* l, Rows out, Rows dl, int64_t rows, int64_t n) {
  const auto& k = kernels<C>();
  int64_t chunk = (rows + CHUNKS - 1) / CHUNKS;
  std::unique_ptr<C[]> partial(new C[dl ? CHUNKS * n : 0]());
  torch::stable::parallel_for(0, CHUNKS, rows * n < 32768 ? CHUNKS : 1, [&](int64_t begin, int64_t end) {
    std::unique_ptr<C[]> left(new C[n]), right(new C[n]);
    for (int64_t i = begin * chunk; i < std::min(end * chunk, rows); ++i) {
      const C* gradient = row_of(g, i, n, left.get());
      if (dl) k.multiply_add(gradient, row_of(v, i, n, right.get()), partial.get() + i / chunk * n, n);
      if (out) scale_row(gradient, l, out, i, n, left.get());
    }
  });
  if (!dl) return;
  for (int64_t c = 1; c < CHUNKS; ++c) k.add(partial.get(), partial.get() + c * n, n);
  k.narrow(dl.dtype, partial.get(), dl.at(0), n);
}

// ia3_l as [n] of C.
template <class C>
std::unique_ptr<C[]> vector(const Tensor& ia3_l, int64_t n) {
  std::unique_ptr<C[]> l(new C[n]);
  check_adapters<C>(dtype_of(ia3_l, "ia3_l"), dtype_of(ia3_l, "ia3_l"));
  kernels<C>().widen(dtype_of(ia3_l, "ia3_l"), contiguous(ia3_l, {n}, "ia3_l"), l.get(), n);
  return l;
}

template <class C>
void forward(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& ia3_l, bool feedforward,
             Tensor& y, const OptionalTensor& base) {
  int64_t m = x.size(0), n = weight.size(0), k = weight.size(1);
  Rows in = rows_of(x, m, k, "x"), out = rows_of(y, m, n, "y"), product = rows_of(base, m, n, "base");
  check_weight(weight, n, k, in.dtype);
  auto l = vector<C>(ia3_l, feedforward ? k : n);
  if constexpr (sizeof(C) == 4) {
    if (!fast_matmul(in.dtype)) {
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
void backward(const Tensor& dy, const OptionalTensor& x, const Tensor& weight, const Tensor& ia3_l, bool feedforward,
              const OptionalTensor& base, OptionalTensor& dx, const OptionalTensor& dia3_l) {
  int64_t m = dy.size(0), n = weight.size(0), k = weight.size(1);
  int64_t features = feedforward ? k : n;
  STD_TORCH_CHECK(!dia3_l || (feedforward ? x : base), "dia3_l needs ", feedforward ? "x" : "base");
  Rows gradient = rows_of(dy, m, n, "dy"), in = rows_of(x, m, k, "x"), product = rows_of(base, m, n, "base");
  Rows out = rows_of(dx, m, k, "dx");
  Rows dl = dia3_l ? Rows{dtype_of(*dia3_l, "dia3_l"), contiguous(*dia3_l, {features}, "dia3_l"), 0} : Rows{};
  check_weight(weight, n, k, gradient.dtype);
  auto l = vector<C>(ia3_l, features);

  if constexpr (sizeof(C) == 4) {
    if (!fast_matmul(gradient.dtype)) {
      Buffer<float> wide(m, n), inner(m, k);
      if (feedforward) {
        convert(gradient, wide.rows(), m, n);
      } else {
        scale_and_reduce<float>(gradient, product, l.get(), wide.rows(), dl, m, n);
        if (!dx) return;
      }
      matmul_upcast(wide.data.get(), m, weight, true, [&](int64_t k0, int64_t columns, Rows block) {
        for (int64_t t = 0; t < m; ++t)
          std::copy_n(block.at(t), columns * sizeof(float), inner.rows().at(t, k0));
      });
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
  int64_t shape[] = {m, features};
  Tensor middle = torch::stable::new_empty(dy, {shape, 2});
  Rows middle_rows = rows_of(middle, m, features, "middle");
  if (feedforward) {
    matmul(dy, weight, true, std::nullopt, middle);
    scale_and_reduce<C>(middle_rows, in, l.get(), out, dl, m, k);
  } else {
    scale_and_reduce<C>(gradient, product, l.get(), middle_rows, dl, m, n);
    matmul(middle, weight, true, std::nullopt, *dx);
  }
}

void ia3_forward(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& ia3_l,
                 bool feedforward, Tensor& y, OptionalTensor base) {
  auto run = x.scalar_type() == ScalarType::Double ? forward<double> : forward<float>;
  run(x, weight, bias, ia3_l, feedforward, y, base);
}

void ia3_backward(const Tensor& dy, const OptionalTensor& x, const Tensor& weight, const Tensor& ia3_l,
                  bool feedforward, const OptionalTensor& base, OptionalTensor dx, OptionalTensor dia3_l) {
  auto run = dy.scalar_type() == ScalarType::Double ? backward<double> : backward<float>;
  run(dy, x, weight, ia3_l, feedforward, base, dx, dia3_l);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyfastpeft, CPU, m) {
  m.impl("ia3_forward", TORCH_BOX(&ia3_forward));
  m.impl("ia3_backward", TORCH_BOX(&ia3_backward));
}

}  // namespace pyfastpeft
