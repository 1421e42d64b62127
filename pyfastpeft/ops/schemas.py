"""Schemas of the raw ops (csrc/ops/schema.cpp states them again for the native library; a test compares the two)."""

import functools
import re
from collections.abc import Callable

import torch

from . import flops

SCHEMAS = {
    "lora_forward": "(Tensor x, Tensor? weight, Tensor? bias, Tensor lora_A, Tensor lora_B, float scaling,"
    " float dropout_p, Tensor? seed, Tensor(a!) y, Tensor(b!) s) -> ()",
    "lora_backward": "(Tensor dy, Tensor? x, Tensor? weight, Tensor lora_A, Tensor lora_B, float scaling,"
    " float dropout_p, Tensor? seed, Tensor? s, Tensor(a!)? dx, Tensor(b!)? dlora_A, Tensor(c!)? dlora_B) -> ()",
    "lora_group_forward": "(Tensor x, Tensor[] weights, Tensor?[] biases, Tensor lora_A, Tensor[] lora_Bs,"
    " float[] scalings, float dropout_p, Tensor? seed, Tensor(a!)[] ys, Tensor(b!) s) -> ()",
    "lora_group_backward": "(Tensor[] dys, Tensor? x, Tensor[] weights, Tensor lora_A, Tensor[] lora_Bs,"
    " float[] scalings, float dropout_p, Tensor? seed, Tensor? s, Tensor(a!)? dx, Tensor(b!)? dlora_A,"
    " Tensor(c!)[] dlora_Bs) -> ()",
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
    "multi_lora_forward": "(Tensor x, Tensor? weight, Tensor? bias, Tensor lora_A, Tensor lora_B, Tensor scaling,"
    " Tensor? ranks, Tensor order, Tensor segments, Tensor(a!) y, Tensor(b!) s) -> ()",
    "multi_lora_backward": "(Tensor dy, Tensor? x, Tensor? weight, Tensor lora_A, Tensor lora_B, Tensor scaling,"
    " Tensor? ranks, Tensor order, Tensor segments, Tensor? s, Tensor(a!)? dx, Tensor(b!)? dlora_A,"
    " Tensor(c!)? dlora_B) -> ()",
}


def define(backend: str, op: str, function: Callable) -> Callable:
    """Register `function`, which writes into its arguments, as torch.ops.pyfastpeft_<backend>.<op>: one node of a
    compiled graph, whatever Python it runs. Returns what runs it."""
    name = f"pyfastpeft_{backend}::{op}"
    torch.library.define(name, SCHEMAS[op])
    torch.library.impl(name, "CompositeExplicitAutograd")(function)
    return _callable(f"pyfastpeft_{backend}", op)


@functools.cache
def native(op: str, namespace: str = "pyfastpeft") -> Callable:
    """What runs the op of the native libraries, torch.ops.<namespace>.<op>."""
    return _callable(namespace, op)


def _callable(namespace: str, op: str) -> Callable:
    """The op itself; in a compiled graph its twin <op>_new, which returns what the op writes, since torch's compiler
    may order a read before the op that writes (scheduler.py's recompute_size_and_body forgets who wrote last)."""
    torch.library.register_fake(f"{namespace}::{op}", lambda *args: None)
    write = getattr(getattr(torch.ops, namespace), op).default
    arguments = write._schema.arguments
    places = [i for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write]

    def targets(args):
        """The tensors that the op writes."""
        written = [args[i] if isinstance(args[i], (list, tuple)) else [args[i]] for i in places]
        return [target for group in written for target in group if target is not None]

    def fresh(*args):
        return [torch.empty_like(target) for target in targets(args)]

    def compute(*args):
        # y holds the base layer's output where the op adds to it.
        adds = op in ("lora_forward", "multi_lora_forward") and args[1] is None
        new = [target.clone() if adds else torch.empty_like(target) for target in targets(args)]
        left = iter(new)
        write(*(_replaced(argument, left) if i in places else _aligned(argument) for i, argument in enumerate(args)))
        return new

    twin = f"{namespace}::{op}_new"
    taken = re.sub(r"\(\w!\)", "", SCHEMAS[op]).removesuffix("()")
    torch.library.define(twin, f"{taken}Tensor[]")
    torch.library.impl(twin, "CompositeExplicitAutograd")(compute)
    torch.library.register_fake(twin)(fresh)
    ops = getattr(torch.ops, namespace)
    flops.register(op, getattr(ops, op), getattr(ops, f"{op}_new"))
    returns = getattr(ops, f"{op}_new").default

    def run(*args):
        if not torch.compiler.is_compiling():
            return write(*args)
        for target, value in zip(targets(args), returns(*args)):
            target.copy_(value)

    return run


def _aligned(argument):
    """`argument`, a tensor, a list of these or anything else, its tensors copied unless they begin at multiples of 16
    bytes: for kernels that could not see when the graph was made."""
    if isinstance(argument, (list, tuple)):
        return [_aligned(each) for each in argument]
    return argument.clone() if isinstance(argument, torch.Tensor) and argument.data_ptr() % 16 else argument


def _replaced(argument, others):
    """`argument`, a tensor, a list of tensors or None, with the next of `others` for every tensor."""
    if isinstance(argument, (list, tuple)):
        return [next(others) for _ in argument]
    return None if argument is None else next(others)
