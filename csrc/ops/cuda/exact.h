// Products of 16-bit activations with float32 numbers on tensor cores, as good as float32's own: activations are exact in
// tf32, the other operand is the sum of two tf32 numbers, and what the tensor cores sum, which they truncate, is to be
// added to a sum outside of them every 64 terms.
#pragma once
#include "ops/cuda/intrinsics.h"

namespace pyfastpeft {

// d += a b with b (or, for `swapped`, a) given in float32.
__device__ __forceinline__ void mma_exact(float (&d)[4], const float (&a)[4], const float (&b)[2], bool swapped) {
  uint32_t high_a[4], low_a[4], high_b[2], low_b[2];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    high_a[i] = swapped ? tf32(a[i]) : __float_as_uint(a[i]);
    low_a[i] = swapped ? tf32(a[i] - __uint_as_float(high_a[i])) : high_a[i];
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    high_b[i] = swapped ? __float_as_uint(b[i]) : tf32(b[i]);
    low_b[i] = swapped ? high_b[i] : tf32(b[i] - __uint_as_float(high_b[i]));
  }
  mma_tf32(d, low_a, low_b);
  mma_tf32(d, high_a, high_b);
}

}  // namespace pyfastpeft
