// csrc/ops/cuda/decode.h as an op, for tests: false where it does not take the operands.
#include "ops/cuda/decode.h"

#include <cuda_runtime.h>

namespace pyfastpeft {

bool fused(const Tensor& x, const Tensor& weight, OptionalTensor bias, OptionalTensor scale, bool scales_bias,
           OptionalTensor lora_A, OptionalTensor lora_B, double scaling, OptionalTensor scalings, OptionalTensor ranks,
           OptionalTensor order, OptionalTensor segments, Tensor y, OptionalTensor s) {
  FusedLayer layer{x, weight, bias, scale, scales_bias, lora_A, lora_B, scaling, scalings, ranks, order, segments, y, s};
  if (!takes(layer)) return false;
  fused_layer(layer, nullptr);
  return true;
}

}  // namespace pyfastpeft

STABLE_TORCH_LIBRARY_FRAGMENT(pyfastpeft, m) {
  m.def(
      "fused_layer(Tensor x, Tensor weight, Tensor? bias, Tensor? scale, bool scales_bias, Tensor? lora_A,"
      " Tensor? lora_B, float scaling, Tensor? scalings, Tensor? ranks, Tensor? order, Tensor? segments, Tensor(a!) y,"
      " Tensor(b!)? s) -> bool");
}
STABLE_TORCH_LIBRARY_IMPL(pyfastpeft, CUDA, m) { m.impl("fused_layer", TORCH_BOX(&pyfastpeft::fused)); }
