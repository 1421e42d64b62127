// Views of tensors as rows in memory, checked once at the boundary.
#pragma once
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <exception>
#include <optional>

#include "ops/cpu/kernels.h"

namespace pyfastpeft {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// C as a dtype of tensors.
template <class C>
constexpr Dtype native = sizeof(C) == 8 ? Dtype::f64 : Dtype::f32;
template <class C>
constexpr ScalarType native_scalar = sizeof(C) == 8 ? ScalarType::Double : ScalarType::Float;

// Whether sums of values of this dtype are formed in C: those of float64 in double, of all others in float.
template <class C>
bool sums_in(Dtype dtype) {
  return (dtype == Dtype::f64) == (sizeof(C) == 8);
}

// Rows of elements at a fixed distance, each contiguous.
struct Rows {
  Dtype dtype = Dtype::f32;
  char* data = nullptr;
  int64_t stride = 0;  // elements from a row to the next

  char* at(int64_t row, int64_t column = 0) const { return data + (row * stride + column) * item_size(dtype); }
  explicit operator bool() const { return data != nullptr; }
};

// None where torch's stable headers have no name for it, as for those of quantised tensors: they raise.
inline std::optional<ScalarType> scalar_type(const Tensor& t) {
  try {
    return t.scalar_type();
  } catch (const std::exception&) {
    return std::nullopt;
  }
}

// None where the kernels do not take it.
inline std::optional<Dtype> float_dtype(const Tensor& t) {
  switch (scalar_type(t).value_or(ScalarType::Undefined)) {
    case ScalarType::Double:
      return Dtype::f64;
    case ScalarType::Float:
      return Dtype::f32;
    case ScalarType::BFloat16:
      return Dtype::bf16;
    case ScalarType::Half:
      return Dtype::f16;
    default:
      return std::nullopt;
  }
}

inline Dtype dtype_of(const Tensor& t, const char* name) {
  auto dtype = float_dtype(t);
  STD_TORCH_CHECK(dtype, name, " must be float64, float32, bfloat16 or float16");
  return *dtype;
}

// t [rows, columns] with unit stride in its columns, of which there are some.
inline Rows rows_of(const Tensor& t, int64_t rows, int64_t columns, const char* name) {
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == columns, name, " must be of shape [", rows, ", ",
                  columns, "]");
  STD_TORCH_CHECK(columns > 0, name, " must have at least one column");
  STD_TORCH_CHECK(columns == 1 || t.stride(1) == 1, name, " must have unit stride in its last dimension");
  return {dtype_of(t, name), static_cast<char*>(t.mutable_data_ptr()), t.stride(0)};
}

// The base layer's weight, of any strides.
inline void check_weight(const Tensor& weight, int64_t rows, int64_t columns, Dtype dtype) {
  STD_TORCH_CHECK(weight.dim() == 2 && weight.size(0) == rows && weight.size(1) == columns && rows > 0 && columns > 0,
                  "weight must be of shape [", rows, ", ", columns, "], none of them 0");
  STD_TORCH_CHECK(dtype_of(weight, "weight") == dtype, "weight must be of the activations' dtype");
}

inline Rows rows_of(const OptionalTensor& t, int64_t rows, int64_t columns, const char* name) {
  return t ? rows_of(*t, rows, columns, name) : Rows{};
}

// t of the given shape without gaps; its elements.
inline char* contiguous(const Tensor& t, std::initializer_list<int64_t> shape, const char* name) {
  STD_TORCH_CHECK(t.dim() == (int64_t)shape.size() && t.is_contiguous(), name, " must be contiguous, with ",
                  shape.size(), " dimensions");
  int64_t dim = 0;
  for (int64_t size : shape) STD_TORCH_CHECK(t.size(dim++) == size, name, " has a wrong size in a dimension");
  return static_cast<char*>(t.mutable_data_ptr());
}

// t of the given shape without gaps, of the dtype C of sums; its elements.
template <class C>
C* sums(const Tensor& t, std::initializer_list<int64_t> shape, const char* name) {
  STD_TORCH_CHECK(dtype_of(t, name) == native<C>, name, " must be of the dtype of sums");
  return reinterpret_cast<C*>(contiguous(t, shape, name));
}

template <class C>
void check_adapters(Dtype dtype, Dtype other) {
  STD_TORCH_CHECK(dtype == other && sums_in<C>(dtype),
                  "adapters must be of one dtype, float64 exactly where the activations are");
}

inline int64_t* integers(const Tensor& t, int64_t size, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Long, name, " must be int64");
  return reinterpret_cast<int64_t*>(contiguous(t, {size}, name));
}

// What follows asks without raising: for ops that take a call whole or leave it, untouched, to the checks in Python.

// Whether t is a dense tensor on the CPU. torch 2.10's headers have no Tensor::layout.
inline bool on_cpu(const Tensor& t) {
  if (!t.defined() || !t.is_cpu()) return false;
  int32_t layout = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(t.get(), &layout));
  return layout == aoti_torch_layout_strided();
}

// Whether t, a dense tensor, is of this shape without gaps.
inline bool shaped(const Tensor& t, std::initializer_list<int64_t> shape) {
  auto sizes = t.sizes();
  return std::equal(sizes.begin(), sizes.end(), shape.begin(), shape.end()) && t.is_contiguous();
}

inline bool shaped(const Tensor& t, ScalarType dtype, int64_t size) {
  return on_cpu(t) && scalar_type(t) == dtype && shaped(t, {size});
}

// t [..., F], a dense tensor of at least one element, as rows [M, F] that do not overlap; none where a copy is needed.
inline Rows separate_rows(const Tensor& t) {
  auto dtype = float_dtype(t);
  if (!dtype || t.dim() < 1 || t.numel() == 0) return {};
  int64_t features = t.size(-1);
  bool gaps = !t.is_contiguous();
  if (gaps && !(t.dim() == 2 && t.stride(1) == 1 && t.stride(0) >= features)) return {};
  return {*dtype, static_cast<char*>(t.mutable_data_ptr()), gaps ? t.stride(0) : features};
}

// Whether these are a linear layer of x [..., K], of which `in` are the rows.  weight: [N, K];  bias: [N] or none
inline bool linear(const Tensor& x, const Rows& in, const Tensor& weight, const OptionalTensor& bias) {
  if (!in || !on_cpu(weight) || weight.dim() != 2 || weight.numel() == 0 || float_dtype(weight) != in.dtype) return false;
  if (weight.size(1) != x.size(-1)) return false;
  return !bias || (on_cpu(*bias) && float_dtype(*bias) == in.dtype && shaped(*bias, {weight.size(0)}));
}

// Whether sums of activations of dtype x are formed in C, and adapters of this one dtype go with them uncast.
template <class C>
bool summed_in(Dtype x, const Tensor& lora_A, const Tensor& lora_B) {
  auto dtype = float_dtype(lora_A);
  return dtype && dtype == float_dtype(lora_B) && sums_in<C>(*dtype) && sums_in<C>(x);
}

// Whether these are an adapter of x [..., K], of which `in` are the rows.  lora_A: [r, K];  lora_B: [N, r]
template <class C>
bool low_rank(const Tensor& x, const Rows& in, const Tensor& lora_A, const Tensor& lora_B, int64_t n) {
  if (!in || lora_A.dim() != 2 || lora_A.numel() == 0 || !summed_in<C>(in.dtype, lora_A, lora_B)) return false;
  int64_t rank = lora_A.size(0);
  return shaped(lora_A, {rank, x.size(-1)}) && shaped(lora_B, {n, rank});
}

// Whether a [M, F], separate rows of t, ends before b begins or begins after b, a dense tensor, ends.
inline bool apart(const Rows& a, int64_t rows, int64_t features, const Tensor& b) {
  int64_t extent = 1;
  for (int64_t i = 0; i < b.dim(); ++i) extent += (b.size(i) - 1) * b.stride(i);
  auto* first = static_cast<const char*>(b.const_data_ptr());
  return a.at(rows - 1, features) <= first || first + extent * b.element_size() <= a.data;
}

// Whether x [..., K] and y [..., N] have the same leading dimensions.
inline bool same_lead(const Tensor& x, const Tensor& y) {
  auto a = x.sizes(), b = y.sizes();
  return std::equal(a.begin(), a.end() - 1, b.begin(), b.end() - 1);
}

}  // namespace pyfastpeft
