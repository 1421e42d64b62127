// A layer for few tokens: base and adapters in one launch, which reads the base layer's weight once.
#pragma once
#include <cuda_runtime.h>

#include "ops/checks.h"

namespace pyfastpeft {

constexpr int64_t kFusedTokens = 64;

// y[t] = scale * (x[t] weight^T + scaling[a] * s[t] lora_B[a]^T) + bias,  s[t] = x[t] lora_A[a]^T,  for adapter a's
// tokens t; without the branch for tokens of no adapter. Where the bias is scaled, too, it stands in the brackets. All
// matrices are of one 16-bit dtype, but lora_A and lora_B may be of float32: then s is as good as float32's, and lora_B
// is rounded as s is, where they meet. Sums are float32; y is rounded once.
struct FusedLayer {
  Tensor x, weight;  // [T, K], [N, K]: rows at a stride
  OptionalTensor bias, scale;  // [N]; scale is float32
  bool scales_bias = false;
  OptionalTensor lora_A, lora_B;  // [L, R, K], [L, N, R], or [R, K], [N, R]: without gaps; or none
  double scaling = 1;  // times
  OptionalTensor scalings;  // [L] float32
  OptionalTensor ranks;  // [L]: true ranks
  OptionalTensor order, segments;  // [T], [L + 1]; without them one adapter serves all tokens
  Tensor y;          // out: [T, N], rows at a stride
  OptionalTensor s;  // out: [T, R] float32, rows at a stride; none where there are no adapters

  int64_t rank() const { return lora_A ? lora_A->size(-2) : 0; }
};

// Whether shapes and alignment are such that fused_layer takes them.
bool takes(const FusedLayer&);

void fused_layer(const FusedLayer&, cudaStream_t);

}  // namespace pyfastpeft
