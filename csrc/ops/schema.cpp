#include <torch/csrc/stable/library.h>

#include "ops/checks.h"

// Raw ops: they write into their mutable arguments and return nothing. pyfastpeft/ops/reference.py holds the formulas.
STABLE_TORCH_LIBRARY(pyfastpeft, m) {
  m.def(
      "lora_forward(Tensor x, Tensor? weight, Tensor? bias, Tensor lora_A, Tensor lora_B, float scaling,"
      " float dropout_p, Tensor? seed, Tensor(a!) y, Tensor(b!) s) -> ()");
  m.def(
      "lora_backward(Tensor dy, Tensor? x, Tensor? weight, Tensor lora_A, Tensor lora_B, float scaling,"
      " float dropout_p, Tensor? seed, Tensor? s, Tensor(a!)? dx, Tensor(b!)? dlora_A, Tensor(c!)? dlora_B) -> ()");
  m.def(
      "lora_group_forward(Tensor x, Tensor[] weights, Tensor?[] biases, Tensor lora_A, Tensor[] lora_Bs,"
      " float[] scalings, float dropout_p, Tensor? seed, Tensor(a!)[] ys, Tensor(b!) s) -> ()");
  m.def(
      "lora_group_backward(Tensor[] dys, Tensor? x, Tensor[] weights, Tensor lora_A, Tensor[] lora_Bs,"
      " float[] scalings, float dropout_p, Tensor? seed, Tensor? s, Tensor(a!)? dx, Tensor(b!)? dlora_A,"
      " Tensor(c!)[] dlora_Bs) -> ()");
  m.def(
      "ia3_forward(Tensor x, Tensor weight, Tensor? bias, Tensor ia3_l, bool feedforward,"
      " Tensor(a!) y, Tensor(b!)? base) -> ()");
  m.def(
      "ia3_backward(Tensor dy, Tensor? x, Tensor weight, Tensor ia3_l, bool feedforward, Tensor? base,"
      " Tensor(a!)? dx, Tensor(b!)? dia3_l) -> ()");
  m.def(
      "bottleneck_forward(Tensor x, Tensor residual, Tensor down, Tensor? down_bias, Tensor up, Tensor? up_bias,"
      " float scaling, str activation, Tensor(a!) y, Tensor(b!) s) -> ()");
  m.def(
      "bottleneck_backward(Tensor dy, Tensor? x, Tensor down, Tensor? down_bias, Tensor up, float scaling,"
      " str activation, Tensor s, bool serial, Tensor(a!)? dx, Tensor(b!)? ddown, Tensor(c!)? ddown_bias,"
      " Tensor(d!)? dup) -> ()");
  m.def(
      "dora_norm(Tensor weight, Tensor lora_A, Tensor lora_B, float scaling, Tensor? weight_norm_squared,"
      " Tensor(a!) norm) -> ()");
  m.def(
      "dora_forward(Tensor x, Tensor weight, Tensor? bias, Tensor lora_A, Tensor lora_B, Tensor scale, float scaling,"
      " float dropout_p, Tensor? seed, Tensor(a!) y, Tensor(b!) s, Tensor(c!)? unscaled) -> ()");
  m.def(
      "dora_backward(Tensor dy, Tensor? x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor scale, float scaling,"
      " float dropout_p, Tensor? seed, Tensor? s, Tensor? unscaled, Tensor(a!)? dx, Tensor(b!)? dlora_A,"
      " Tensor(c!)? dlora_B, Tensor(d!)? dscale) -> ()");
  m.def("group_tokens(Tensor slots, Tensor(a!) order, Tensor(b!) segments) -> ()");
  m.def(
      "multi_lora_forward(Tensor x, Tensor? weight, Tensor? bias, Tensor lora_A, Tensor lora_B, Tensor scaling,"
      " Tensor? ranks, Tensor order, Tensor segments, Tensor(a!) y, Tensor(b!) s) -> ()");
  m.def(
      "multi_lora_backward(Tensor dy, Tensor? x, Tensor? weight, Tensor lora_A, Tensor lora_B, Tensor scaling,"
      " Tensor? ranks, Tensor order, Tensor segments, Tensor? s, Tensor(a!)? dx, Tensor(b!)? dlora_A,"
      " Tensor(c!)? dlora_B) -> ()");
  // An ordinary call whole, checks included; false or none, with nothing written, where it is out of the ordinary.
  m.def("lora_call(Tensor x, Tensor weight, Tensor? bias, Tensor lora_A, Tensor lora_B, float scaling) -> Tensor?");
  m.def(
      "lora_call_with_s(Tensor x, Tensor weight, Tensor? bias, Tensor lora_A, Tensor lora_B, float scaling)"
      " -> (Tensor?, Tensor?)");
  m.def(
      "lora_gradients(Tensor dy, Tensor? x, Tensor? weight, Tensor lora_A, Tensor lora_B, float scaling,"
      " float dropout_p, Tensor? seed, Tensor? s, bool need_x, bool need_A, bool need_B)"
      " -> (Tensor?, Tensor?, Tensor?)");
  m.def("lora_call_(Tensor(a!) y, Tensor x, Tensor lora_A, Tensor lora_B, float scaling) -> bool");
  m.def(
      "multi_lora_call(Tensor x, Tensor weight, Tensor? bias, Tensor lora_A, Tensor lora_B, Tensor slots,"
      " Tensor? segments, Tensor? scalings, float scaling, Tensor? ranks) -> Tensor?");
  m.def(
      "multi_lora_call_(Tensor(a!) y, Tensor x, Tensor lora_A, Tensor lora_B, Tensor slots, Tensor? segments,"
      " Tensor? scalings, float scaling, Tensor? ranks) -> bool");
  m.def(
      "multi_scale_call(Tensor x, Tensor scale, Tensor? shift, Tensor slots, Tensor? segments) -> Tensor?");
  m.def(
      "ia3_call(Tensor x, Tensor weight, Tensor? bias, Tensor ia3_l, bool feedforward, bool keep_base)"
      " -> (Tensor?, Tensor?)");
  m.def(
      "ia3_gradients(Tensor dy, Tensor? x, Tensor weight, Tensor ia3_l, bool feedforward, Tensor? base, bool need_x,"
      " bool need_l) -> (Tensor?, Tensor?)");
  m.def(
      "dora_call(Tensor x, Tensor weight, Tensor? bias, Tensor lora_A, Tensor lora_B, Tensor magnitude, float scaling,"
      " bool keep_unscaled) -> (Tensor?, Tensor?, Tensor?, Tensor?, Tensor?)");
  m.def(
      "dora_gradients(Tensor dy, Tensor? x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor scale, Tensor norm,"
      " float scaling, float dropout_p, Tensor? seed, Tensor? s, Tensor? unscaled, bool need_x, bool need_A,"
      " bool need_B, bool need_magnitude) -> (Tensor?, Tensor?, Tensor?, Tensor?)");
  m.def("linear_call(Tensor x, Tensor weight, Tensor? bias) -> Tensor?");
  m.def("linear_gradient(Tensor dy, Tensor weight) -> Tensor?");
  m.def("prefers_own_linear(Tensor weight) -> bool");
  m.def("cpu_capability() -> str");
  m.def("cuda_capability() -> str");
}

namespace pyfastpeft {

namespace {

template <class Result, class... Arguments>
Result refuse(Arguments...) {
  return {};
}

using T = Tensor;
using O = OptionalTensor;

void refuse_all(torch::stable::detail::StableLibrary& m) {
  m.impl("lora_call", TORCH_BOX((&refuse<O, T, T, O, T, T, double>)));
  m.impl("lora_call_with_s", TORCH_BOX((&refuse<std::tuple<O, O>, T, T, O, T, T, double>)));
  m.impl("lora_gradients", TORCH_BOX((&refuse<std::tuple<O, O, O>, T, O, O, T, T, double, double, O, O, bool, bool, bool>)));
  m.impl("lora_call_", TORCH_BOX((&refuse<bool, T, T, T, T, double>)));
  m.impl("ia3_call", TORCH_BOX((&refuse<std::tuple<O, O>, T, T, O, T, bool, bool>)));
  m.impl("ia3_gradients", TORCH_BOX((&refuse<std::tuple<O, O>, T, O, T, T, bool, O, bool, bool>)));
  m.impl("dora_call", TORCH_BOX((&refuse<std::tuple<O, O, O, O, O>, T, T, O, T, T, T, double, bool>)));
  m.impl("dora_gradients", TORCH_BOX((&refuse<std::tuple<O, O, O, O>, T, O, T, T, T, T, T, double, double, O, O, O, bool,
                                              bool, bool, bool>)));
  m.impl("linear_call", TORCH_BOX((&refuse<O, T, T, O>)));
  m.impl("linear_gradient", TORCH_BOX((&refuse<O, T, T>)));
  m.impl("multi_lora_call", TORCH_BOX((&refuse<O, T, T, O, T, T, T, O, O, double, O>)));
  m.impl("multi_lora_call_", TORCH_BOX((&refuse<bool, T, T, T, T, T, O, O, double, O>)));
  m.impl("multi_scale_call", TORCH_BOX((&refuse<O, T, T, O, T, O>)));
}

}  // namespace

// Modes, transforms, traces and autocast have to see what an op consists of; nested tensors have no rows.
STABLE_TORCH_LIBRARY_IMPL(pyfastpeft, PythonTLSSnapshot, m) { refuse_all(m); }
STABLE_TORCH_LIBRARY_IMPL(pyfastpeft, FuncTorchDynamicLayerFrontMode, m) { refuse_all(m); }
STABLE_TORCH_LIBRARY_IMPL(pyfastpeft, Tracer, m) { refuse_all(m); }
STABLE_TORCH_LIBRARY_IMPL(pyfastpeft, AutocastCPU, m) { refuse_all(m); }
STABLE_TORCH_LIBRARY_IMPL(pyfastpeft, NestedTensorCPU, m) { refuse_all(m); }
STABLE_TORCH_LIBRARY_IMPL(pyfastpeft, AutogradNestedTensor, m) { refuse_all(m); }

}  // namespace pyfastpeft
