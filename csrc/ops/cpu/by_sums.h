// Ops that are templates over the dtype C of their sums: double where their first argument is float64, else float.
#pragma once
#include <torch/csrc/stable/library.h>

#include <vector>

#include "ops/checks.h"

namespace pyfastpeft {

inline bool is_double(const Tensor& t) { return t.defined() && scalar_type(t) == ScalarType::Double; }
inline bool is_double(const std::vector<Tensor>& list) { return !list.empty() && is_double(list[0]); }

template <auto with_float, auto with_double>
struct BySums;

template <class Result, class First, class... Rest, Result (*with_float)(First, Rest...),
          Result (*with_double)(First, Rest...)>
struct BySums<with_float, with_double> {
  static Result run(First first, Rest... rest) { return (is_double(first) ? with_double : with_float)(first, rest...); }
};

}  // namespace pyfastpeft

// TORCH_BOX of op<C>, C chosen for every call.
#define BOX_BY_SUMS(op) TORCH_BOX((&BySums<&op<float>, &op<double>>::run))
