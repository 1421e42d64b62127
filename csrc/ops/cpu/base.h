// The base layer's matmul: torch's own where it is fast, else ours, by blocks of the weight that stay in cache.
#pragma once
#include <algorithm>
#include <functional>
#include <memory>

#include "ops/checks.h"

namespace pyfastpeft {

constexpr int64_t SERIAL_WORK = 1 << 16;  // multiply-adds under which threads cost more than they bring

inline int64_t blocks(int64_t n, int64_t block) { return (n + block - 1) / block; }

// Rows of float32 (or of C) that live as long as this.
template <class C>
struct Buffer {
  std::unique_ptr<C[]> data;
  int64_t columns;

  Buffer(int64_t rows, int64_t columns) : data(new C[rows * columns]), columns(columns) {}
  Rows rows() const { return {native<C>, reinterpret_cast<char*>(data.get()), columns}; }
};

// Zeros beside the first n of `width` columns of a panel.
template <class C>
void pad(C* panel, int64_t depth, int64_t n, int64_t width) {
  for (int64_t i = 0; n < width && i < depth; ++i) std::fill_n(panel + i * width + n, width - n, C(0));
}

// panel[i][j] = scale[i] in[j][i] for i < depth, j < n, without `scale` as if it were 1, and 0 for n <= j < width.
template <class C>
void pack(const Rows& in, int64_t n, int64_t depth, const C* scale, C* panel, int64_t width) {
  kernels<C>().transpose(in.dtype, in.data, in.stride, n, depth, 1, panel, width);
  if (scale) kernels<C>().copy(native<C>, panel, width, depth, n, scale, panel, width);
  pad(panel, depth, n, width);
}

// Elements of C at fixed distances.
template <class C>
struct Matrix {
  C* data;
  int64_t rows, columns, row_stride, column_stride = 1;
  Matrix transposed() const { return {data, columns, rows, column_stride, row_stride}; }
};

// out = alpha * left right + beta * out by torch's product; out is not read for beta 0.
template <class C>
void matmul(const Matrix<C>& left, const Matrix<C>& right, double alpha, double beta, const Matrix<C>& out);

// A view of t's memory from its first element on.
Tensor as_matrix(const Tensor& t, int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride = 1);

// A new tensor [..., F] of the dtype of x [..., K], on the CPU.
Tensor empty_rows(const Tensor& x, int64_t features);

// t [n] as C; null where there is none.
template <class C>
std::unique_ptr<C[]> widened(const OptionalTensor& t, int64_t n, const char* name) {
  if (!t) return nullptr;
  check_adapters<C>(dtype_of(*t, name), dtype_of(*t, name));
  std::unique_ptr<C[]> out(new C[n]);
  kernels<C>().widen(dtype_of(*t, name), contiguous(*t, {n}, name), out.get(), n);
  return out;
}

// Whether base products of activations of this dtype are formed from a float32 copy of them, by matmul_upcast.
inline bool upcasts(Dtype dtype) { return item_size(dtype) == 2 && !fast_matmul(dtype); }

// out = in w^T (+ bias), or in w for `transposed`.  in: [M, K];  w: [N, K];  out: [M, N];  transposed: in [M, N], out [M, K]
void matmul(const Tensor& in, const Tensor& w, bool transposed, const OptionalTensor& bias, Tensor& out);

// The same in float32 by our own loops, and whether these are to be preferred to torch's. With `scale`, as if w's columns or,
// for `transposed`, its rows were multiplied by it first.  scale: [K], transposed [N]
bool prefers_own_matmul(const Tensor& in, const Tensor& w, const Tensor& out);
void own_matmul(const Tensor& in, const Tensor& w, bool transposed, const OptionalTensor& bias, Tensor& out,
                const float* scale = nullptr);

// Columns q0 .. q0 + n of in w^T, or of in w for `transposed`, block by block on all threads: done(q0, n, block), with
// block [M, n] float32, may finish them in cache. in: [M, P] float32 without gaps; w: [Q, P] (transposed: [P, Q]), 16-bit.
void matmul_upcast(const float* in, int64_t m, const Tensor& w, bool transposed,
                   const std::function<void(int64_t q0, int64_t n, Rows block)>& done);

// out = in, row by row on all threads; one of them is float32.  in, out: [rows, columns]
void convert(Rows in, Rows out, int64_t rows, int64_t columns);

}  // namespace pyfastpeft
