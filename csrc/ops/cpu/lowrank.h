// The low-rank branch, y[t] += scaling * drop(x[t]) A^T B^T, of one adapter or of many, forward and backward.
#pragma once
#include <vector>

#include "ops/checks.h"

namespace pyfastpeft {

struct Dropout {
  double p = 0;
  uint64_t seed = 0;
};

// The tokens of one adapter: order[0 .. count), or, without order, 0 .. count.
struct Tokens {
  const int64_t* order;
  int64_t count;
  int64_t operator[](int64_t i) const { return order ? order[i] : i; }
};

struct Adapter {
  Rows a;        // [rank, K]
  Rows b;        // [N, rank]
  int64_t rank;  // rows of a and columns of b that count
  double scaling;
  Tokens tokens;
  Rows da{}, db{};  // out: gradients of a and b, where wanted
};

template <class C>
struct Branch {
  std::vector<Adapter> adapters;
  int64_t features_in;   // K
  int64_t features_out;  // N
  Dropout dropout{};
};

// s[t] = drop(x[t]) A^T.  x: [M, K];  s: [M, s_stride], out
template <class C>
void shrink(const Branch<C>&, Rows x, C* s, int64_t s_stride);

// y[t] += scaling * s[t] B^T, on columns n0 .. n1, whose memory begins at y.  y: [M, n1 - n0], out
template <class C>
void expand(const Branch<C>&, const C* s, int64_t s_stride, Rows y, int64_t n0, int64_t n1);

// ds = scaling * dy B;  dB = scaling * dy^T s;  dA = ds^T drop(x);  dx[t] = or += drop'(ds A): what is wanted of these.
// dy: [M, N];  x: [M, K];  s: [M, s_stride];  dx: [M, K], out
template <class C>
void backward(const Branch<C>&, Rows dy, Rows x, const C* s, int64_t s_stride, Rows dx, bool accumulate);

}  // namespace pyfastpeft
