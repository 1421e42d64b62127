"""Schemas of the raw ops (csrc/ops/schema.cpp states them again for the native library; a test compares the two)."""

from collections.abc import Callable

import torch

SCHEMAS = {
    "lora_forward": "(Tensor x, Tensor? weight, Tensor? bias, Tensor lora_A, Tensor lora_B, float scaling,"
    " float dropout_p, Tensor? seed, Tensor(a!) y, Tensor(b!) s) -> ()",
    "lora_backward": "(Tensor dy, Tensor? x, Tensor? weight, Tensor lora_A, Tensor lora_B, float scaling,"
    " float dropout_p, Tensor? seed, Tensor? s, Tensor(a!)? dx, Tensor(b!)? dlora_A, Tensor(c!)? dlora_B) -> ()",
    "ia3_forward": "(Tensor x, Tensor weight, Tensor? bias, Tensor ia3_l, bool feedforward,"
    " Tensor(a!) y, Tensor(b!)? base) -> ()",
    "ia3_backward": "(Tensor dy, Tensor? x, Tensor weight, Tensor ia3_l, bool feedforward, Tensor? base,"
    " Tensor(a!)? dx, Tensor(b!)? dia3_l) -> ()",
    "bottleneck_forward": "(Tensor x, Tensor residual, Tensor down, Tensor? down_bias, Tensor up, Tensor? up_bias,"
    " float scaling, str activation, Tensor(a!) y, Tensor(b!) s) -> ()",
    "bottleneck_backward": "(Tensor dy, Tensor? x, Tensor down, Tensor? down_bias, Tensor up, float scaling,"
    " str activation, Tensor s, bool serial, Tensor(a!)? dx, Tensor(b!)? ddown, Tensor(c!)? ddown_bias,"
    " Tensor(d!)? dup) -> ()",
    "dora_norm": "(Tensor weight, Tensor lora_A, Tensor lora_B, float scaling, Tensor? weight_norm_squared,"
    " Tensor(a!) norm) -> ()",
    "dora_forward": "(Tensor x, Tensor weight, Tensor? bias, Tensor lora_A, Tensor lora_B, Tensor scale, float scaling,"
    " float dropout_p, Tensor? seed, Tensor(a!) y, Tensor(b!) s, Tensor(c!)? unscaled) -> ()",
    "dora_backward": "(Tensor dy, Tensor? x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor scale, float scaling,"
    " float dropout_p, Tensor? seed, Tensor? s, Tensor? unscaled, Tensor(a!)? dx, Tensor(b!)? dlora_A,"
    " Tensor(c!)? dlora_B, Tensor(d!)? dscale) -> ()",
    "group_tokens": "(Tensor slots, Tensor(a!) order, Tensor(b!) segments) -> ()",
    "multi_lora_forward": "(Tensor x, Tensor lora_A, Tensor lora_B, Tensor scaling, Tensor? ranks, Tensor order,"
    " Tensor segments, Tensor(a!) y, Tensor(b!) s) -> ()",
    "multi_lora_backward": "(Tensor dy, Tensor? x, Tensor lora_A, Tensor lora_B, Tensor scaling, Tensor? ranks,"
    " Tensor order, Tensor segments, Tensor? s, Tensor(a!)? dx, Tensor(b!)? dlora_A, Tensor(c!)? dlora_B) -> ()",
}


def define(backend: str, op: str, function: Callable):
    """Register `function`, which writes into its arguments, as torch.ops.pyfastpeft_<backend>.<op>: one node of a
    compiled graph, whatever Python it runs. Returns the op."""
    name = f"pyfastpeft_{backend}::{op}"
    torch.library.define(name, SCHEMAS[op])
    torch.library.impl(name, "CompositeExplicitAutograd")(function)
    return _with_fake(f"pyfastpeft_{backend}", op)


def native(op: str):
    """The op of the native library, torch.ops.pyfastpeft.<op>."""
    return _with_fake("pyfastpeft", op)


def _with_fake(namespace: str, op: str):
    torch.library.register_fake(f"{namespace}::{op}", lambda *args: None)
    return getattr(getattr(torch.ops, namespace), op).default
