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

inline Dropout dropout_of(double p, const OptionalTensor& seed) {
  return seed ? Dropout{p, (uint64_t)*integers(*seed, 1, "seed")} : Dropout{};
}

// The branch of one adapter, which every token goes through.
template <class C>
Branch<C> single(const Tensor& lora_A, const Tensor& lora_B, double scaling, int64_t tokens, double p,
                 const OptionalTensor& seed) {
  int64_t rank = lora_A.size(0), k = lora_A.size(1), n = lora_B.size(0);
  Rows a = rows_of(lora_A, rank, k, "lora_A"), b = rows_of(lora_B, n, rank, "lora_B");
  check_adapters<C>(a.dtype, b.dtype);
  return {{{a, b, rank, scaling, {nullptr, tokens}}}, k, n, dropout_of(p, seed)};
}

// s[t] = drop(x[t]) A^T.  x: [M, K];  s: [M, s_stride], out
template <class C>
void shrink(const Branch<C>&, Rows x, C* s, int64_t s_stride);

// Where an expanded branch goes:  unscaled = from + branch;  y = scale * unscaled + shift.  What is null is left out.
template <class C>
struct Target {
  Rows y;                    // [M, N], out
  Rows from{};               // [M, N], may be y
  const C* scale = nullptr;  // [N]
  const C* shift = nullptr;  // [N]
  Rows unscaled{};           // [M, N], out

  // Its columns from c0 on.
  Target columns(int64_t c0) const {
    auto slice = [c0](const Rows& rows) { return rows ? Rows{rows.dtype, rows.at(0, c0), rows.stride} : rows; };
    return {slice(y), slice(from), scale ? scale + c0 : nullptr, shift ? shift + c0 : nullptr, slice(unscaled)};
  }
};

// y[t] = scale * (from[t] + scaling * s[t] B^T) + shift, on columns n0 .. n1, where the target's memory begins.
template <class C>
void expand(const Branch<C>&, const C* s, int64_t s_stride, const Target<C>&, int64_t n0, int64_t n1);

// y[t] += scaling * s[t] B^T, on columns n0 .. n1, whose memory begins at y.  y: [M, n1 - n0], out
template <class C>
void expand(const Branch<C>& branch, const C* s, int64_t s_stride, Rows y, int64_t n0, int64_t n1) {
  expand<C>(branch, s, s_stride, Target<C>{y, y}, n0, n1);
}

// What stands in the middle of a branch with an activation, of one adapter alone.
template <class C>
struct Middle {
  const C* slope = nullptr;  // [M, rank]: ds is multiplied by it
  C* sum = nullptr;          // [rank], out: ds summed over tokens
};

// ds of one adapter: its token i's ranks are at data + i * stride.
template <class C>
struct Shrunk {
  C* data;
  int64_t stride;
  C* operator()(int64_t i) const { return data + i * stride; }
};

// dB = scaling * dy^T s and, where ds is not empty, ds = scaling * dy B * slope.
// dy: [M, N];  s: [M, s_stride];  ds: of every adapter, out
template <class C>
void expand_backward(const Branch<C>&, Rows dy, const C* s, int64_t s_stride, const std::vector<Shrunk<C>>& ds,
                     const Middle<C>& middle = {});

// dA = ds^T drop(x);  dx = from + drop'(ds A).  x: [M, K];  from: [M, K], may be dx or null;  dx: [M, K], out
template <class C>
void shrink_backward(const Branch<C>&, const std::vector<Shrunk<C>>& ds, Rows x, Rows from, Rows dx);

// Both of these: what is wanted of them.
template <class C>
void backward(const Branch<C>&, Rows dy, Rows x, const C* s, int64_t s_stride, Rows from, Rows dx,
              const Middle<C>& middle = {});

}  // namespace pyfastpeft
