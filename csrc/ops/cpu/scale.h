// Rows times a vector, and what the vector's gradient needs.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <memory>

#include "ops/checks.h"

namespace pyfastpeft {

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

}  // namespace pyfastpeft
