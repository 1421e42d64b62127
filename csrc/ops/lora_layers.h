// The layers of a LoRA op: one, or several of one input.
#pragma once
#include <vector>

#include "ops/checks.h"

namespace pyfastpeft {

// One of the layers that an x goes through.
struct LoraLayer {
  OptionalTensor weight;  // [N, K]
  OptionalTensor bias;    // [N]
  Tensor lora_B;          // [N, r]
  double scaling;

  int64_t features() const { return lora_B.size(0); }
  int64_t rank() const { return lora_B.size(1); }
};

inline std::vector<LoraLayer> lora_layers(const std::vector<Tensor>& weights, const std::vector<OptionalTensor>& biases,
                                          const std::vector<Tensor>& lora_Bs, const std::vector<double>& scalings) {
  size_t count = weights.size();
  STD_TORCH_CHECK(count > 0 && lora_Bs.size() == count && scalings.size() == count &&
                      (biases.empty() || biases.size() == count),
                  "each of at least one layer needs a weight, a bias or none, a lora_B and a scaling");
  std::vector<LoraLayer> layers;
  for (size_t i = 0; i < count; ++i)
    layers.push_back({weights[i], biases.empty() ? std::nullopt : biases[i], lora_Bs[i], scalings[i]});
  return layers;
}

}  // namespace pyfastpeft
