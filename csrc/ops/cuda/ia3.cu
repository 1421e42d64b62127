#include <torch/csrc/stable/library.h>

#include "ops/cuda/base.h"
#include "ops/cuda/columns.h"
#include "ops/cuda/decode.h"

namespace pyfastpeft {

namespace {

// y = (x weight^T + bias) * l in the epilogue of a product, y rounded once; false where none is to be had.
bool forward_by_gemm(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& ia3_l,
                     const Rows& in, const Rows& out, Tensor& y, cudaStream_t stream) {
  int64_t m = x.size(0), n = weight.size(0), k = weight.size(1);
  if (item_size(in.dtype) != 2 || weight.stride(1) != 1 || k % 8 || n % 8) return false;
  if (bias && dtype_of(*bias, "bias") != in.dtype) return false;
  Rows w = rows_of(weight, n, k, "weight");
  if (in.stride == 0) return false;  // no tensor map describes rows that are one and the same
  if (!in_runs(in, k) || !in_runs(w, k) || !in_runs(out, n)) return false;
  bool few = m <= kFusedTokens;
  if (!few && !gemm_pays(m, n)) return false;
  Tensor scale = widened(ia3_l, {n}, "ia3_l", stream);
  if (few) {
    FusedLayer layer{.x = x, .weight = weight, .bias = bias, .scale = scale, .scales_bias = true, .y = y};
    if (!takes(layer)) return false;
    fused_layer(layer, stream);
    return true;
  }
  multiply({.bfloat16 = in.dtype == Dtype::bf16,
            .rows = m,
            .columns = n,
            .products = {{k, in.data, w.data, in.stride, w.stride}},
            .scale = static_cast<const float*>(scale.const_data_ptr()),
            .scaled_bias = bias ? contiguous(*bias, {n}, "bias") : nullptr,
            .out = out.data,
            .out_stride = out.stride},
           stream);
  return true;
}

void ia3_forward(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& ia3_l,
                 bool feedforward, Tensor& y, OptionalTensor base) {
  OnDevice device(x);
  int64_t m = x.size(0), n = weight.size(0), k = weight.size(1);
  Rows in = rows_of(x, m, k, "x"), out = rows_of(y, m, n, "y"), product = rows_of(base, m, n, "base");
  check_weight(weight, n, k, in.dtype);
  AnyFloats l = floats(ia3_l, {feedforward ? k : n}, "ia3_l");
  if (feedforward) {
    Tensor scaled = scratch(x, {m, k}, x.scalar_type());
    scale(in, l, nullptr, rows_of(scaled, m, k, "x"), m, k, device.stream());
    base_forward(scaled, weight, bias, y);
    return;
  }
  if (!base && forward_by_gemm(x, weight, bias, ia3_l, in, out, y, device.stream())) return;
  Tensor unscaled = base ? *base : y;
  base_forward(x, weight, bias, unscaled);
  scale(base ? product : out, l, nullptr, out, m, n, device.stream());
}

void ia3_backward(const Tensor& dy, const OptionalTensor& x, const Tensor& weight, const Tensor& ia3_l,
                  bool feedforward, const OptionalTensor& base, OptionalTensor dx, OptionalTensor dia3_l) {
  OnDevice device(dy);
  int64_t m = dy.size(0), n = weight.size(0), k = weight.size(1), features = feedforward ? k : n;
  STD_TORCH_CHECK(!dia3_l || (feedforward ? x : base), "dia3_l needs ", feedforward ? "x" : "base");
  Rows gradient = rows_of(dy, m, n, "dy"), in = rows_of(x, m, k, "x"), product = rows_of(base, m, n, "base");
  Rows out = rows_of(dx, m, k, "dx");
  check_weight(weight, n, k, gradient.dtype);
  AnyFloats l = floats(ia3_l, {features}, "ia3_l"), dl{};
  if (dia3_l) dl = floats(*dia3_l, {features}, "dia3_l");
  // Both scale the first and, where the scale trains, sum its products with the second on the way.
  auto scale_to = [&](const Rows& first, const Rows& second, const Rows& scaled) {
    if (dia3_l) {
      scale_and_sum(dy, first, second, l, scaled, dl, m, features, device.stream());
    } else if (scaled) {
      scale(first, l, nullptr, scaled, m, features, device.stream());
    }
  };
  if (feedforward) {
    Tensor inner = scratch(dy, {m, k}, dy.scalar_type());
    base_backward(dy, weight, inner);
    scale_to(rows_of(inner, m, k, "dy"), in, out);
  } else if (dx) {
    Tensor scaled = scratch(dy, {m, n}, dy.scalar_type());
    scale_to(gradient, product, rows_of(scaled, m, n, "dy"));
    base_backward(scaled, weight, *dx);
  } else {
    scale_to(gradient, product, Rows{});
  }
}

}  // namespace

}  // namespace pyfastpeft

STABLE_TORCH_LIBRARY_IMPL(pyfastpeft, CUDA, m) {
  m.impl("ia3_forward", TORCH_BOX(&pyfastpeft::ia3_forward));
  m.impl("ia3_backward", TORCH_BOX(&pyfastpeft::ia3_backward));
}
