// The products of csrc/ops/cuda/gemm.h by their formula.
#include "ops/cuda/gemm.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <vector>

namespace pyfastpeft {

namespace {

template <class T, bool kBackward>
void product(const Gemm& g) {
  auto add = [&](std::vector<float>& sums, const void* left, int64_t left_stride, const void* right,
                 int64_t right_stride, int64_t depth, int64_t m) {
    auto* rows = static_cast<const T*>(left) + m * left_stride;
    auto* factor = static_cast<const T*>(right);
    auto value = [&](int64_t k, int64_t n) {
      return factor ? float(kBackward ? factor[k * right_stride + n] : factor[n * right_stride + k]) : 0.f;
    };
    for (int64_t k = 0; k < depth; ++k)
      for (int64_t n = 0; n < g.columns; ++n) sums[n] += float(rows[k]) * value(k, n);
  };
  for (int64_t m = 0; m < g.rows; ++m) {
    std::vector<float> sums(g.columns);
    for (const Gemm::Product& it : g.products) add(sums, it.left, it.left_stride, it.right, it.right_stride, it.depth, m);
    int64_t tail = g.tail_of_block ? g.tail_of_block[m / kTailBlock] : 0;
    const T* tail_right = static_cast<const T*>(g.tail_right) + tail * g.tail_right_distance;
    bool there = tail >= 0 && tail < g.tails;
    add(sums, g.tail_left, g.tail_left_stride, there ? tail_right : nullptr, g.tail_right_stride, g.rank, m);
    for (int64_t n = 0; n < g.columns; ++n) {
      auto at = [&](const void* vector) { return vector ? float(static_cast<const T*>(vector)[n]) : 0.f; };
      float scaled = (g.scale ? g.scale[n] : 1.f) * (sums[n] + at(g.scaled_bias));
      static_cast<T*>(g.out)[m * g.out_stride + n] = T(scaled + at(g.bias));
    }
  }
}

bool aligned(const void* pointer, int64_t stride) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0 && stride % 8 == 0 && stride > 0;
}

}  // namespace

template <bool kBfloat16, bool kBackward>
const char* hopper_gemm(const Gemm& g, cudaStream_t) {
  auto both = [](const void* left, int64_t left_stride, const void* right, int64_t right_stride) {
    return aligned(left, left_stride) && aligned(right, right_stride);
  };
  bool taken = aligned(g.out, g.out_stride) && g.tail_right_distance % 8 == 0;
  taken &= !g.rank || both(g.tail_left, g.tail_left_stride, g.tail_right, g.tail_right_stride);
  for (const Gemm::Product& it : g.products)
    taken &= !it.depth || both(it.left, it.left_stride, it.right, it.right_stride);
  if (!taken) return "TMA takes multiples of 16 bytes only";
  product<std::conditional_t<kBfloat16, __nv_bfloat16, __half>, kBackward>(g);
  return nullptr;
}

template const char* hopper_gemm<true, false>(const Gemm&, cudaStream_t);
template const char* hopper_gemm<true, true>(const Gemm&, cudaStream_t);
template const char* hopper_gemm<false, false>(const Gemm&, cudaStream_t);
template const char* hopper_gemm<false, true>(const Gemm&, cudaStream_t);

}  // namespace pyfastpeft
