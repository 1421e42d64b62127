"""Argument checks shared by the ops. Every message names the argument, what was given and what is needed."""

import math
import os
from numbers import Integral, Real

import torch

from .dispatch import FLOATS


def _describe(value) -> str:
    if isinstance(value, torch.Tensor):
        return f"a {value.dtype} tensor of shape {list(value.shape)} on {value.device}"
    shown = repr(value)  # of a list of slots, perhaps, one for each token
    return f"{shown if len(shown) <= 200 else f'{shown[:200]}…'} ({type(value).__name__})"


def need(condition: bool, op: str, argument: str, given: str, needed: str, error=ValueError) -> None:
    """Raise `error` unless `condition` holds. `given` says what is wrong with the argument."""
    if not condition:
        raise error(f"{op}: {argument} is {given}; it must be {needed}")


def need_value(condition: bool, op: str, argument: str, value, needed: str, error=ValueError) -> None:
    """`need`, for an argument whose value says what is wrong with it."""
    if not condition:
        need(False, op, argument, _describe(value), needed, error)


def floating(op: str, argument: str, tensor) -> None:
    """A dense tensor of a float dtype that the kernels take."""
    if not isinstance(tensor, torch.Tensor) or tensor.dtype not in FLOATS:
        need_value(False, op, argument, tensor, "a float64, float32, bfloat16 or float16 tensor", TypeError)
    if tensor.layout != torch.strided:
        need(False, op, argument, f"of layout {tensor.layout}", "a dense tensor, of layout torch.strided", TypeError)
    if tensor.is_nested:
        need(False, op, argument, "a nested tensor", "a dense one", TypeError)


def integral(op: str, argument: str, tensor) -> None:
    """A tensor of any integer dtype."""
    integer = isinstance(tensor, torch.Tensor) and not (
        tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool
    )
    need_value(integer, op, argument, tensor, "an integer tensor", TypeError)


def integers(op: str, argument: str, tensor: torch.Tensor, size: int, x: torch.Tensor) -> None:
    """int64 of shape [size], on x's device."""
    if tensor.shape != (size,) or tensor.dtype != torch.int64 or tensor.device != x.device:
        need_value(False, op, argument, tensor, f"a torch.int64 tensor of shape [{size}] on {x.device}")


def features(op: str, argument: str, tensor: torch.Tensor) -> None:
    need_value(tensor.dim() >= 1 and tensor.shape[-1] > 0, op, argument, tensor, "of shape [..., K] with K >= 1")


def shape(op: str, argument: str, tensor: torch.Tensor, expected: tuple[int, ...], names: str) -> None:
    if tuple(tensor.shape) != expected:
        need_value(False, op, argument, tensor, f"of shape {names} = {list(expected)}")


def distributed(tensor: torch.Tensor) -> bool:
    """Whether this is a DTensor, of which this process may hold a part."""
    return hasattr(tensor, "full_tensor")


def entries(op: str, argument: str, values, members, of: str) -> None:
    """A list or tuple of as many entries as `members`, the argument `of`, has, or at least one where they are the
    same."""
    if not isinstance(values, (list, tuple)):
        given = f"a {type(values).__name__}"
        need(False, op, argument, given, "a list or tuple of one entry for each layer", TypeError)
    if not 0 < len(values) == len(members):
        needed = "of one entry for each of at least one layer" if argument == of else f"of {len(members)}, as {of} is"
        need(False, op, argument, f"of {len(values)} entries", needed)


def like(op: str, argument: str, tensor: torch.Tensor, x: torch.Tensor, dtype: bool = True, other: str = "x") -> None:
    """Same device as x and, where `dtype`, the same dtype."""
    if tensor.device != x.device:
        need_value(False, op, argument, tensor, f"on {x.device}, where {other} is")
    if dtype and tensor.dtype != x.dtype:
        need_value(False, op, argument, tensor, f"of dtype {x.dtype}, as {other} is", TypeError)


def adapters(
    op: str,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    x: torch.Tensor,
    lead: tuple[str, ...] = (),
    called: tuple[str, str] = ("lora_A", "lora_B"),
    other: str = "x",
) -> None:
    """lora_A [*lead, r, K] and lora_B [*lead, N, r]: dtypes, devices and shapes that fit each other and x. The op
    calls these two by the names in `called`, and x by the name `other`."""
    name_A, name_B = called
    floating(op, name_A, lora_A)
    floating(op, name_B, lora_B)
    names, dims = "".join([f"{name}, " for name in lead]), 2 + len(lead)
    if lora_A.dim() != dims or lora_B.dim() != dims:
        need_value(lora_A.dim() == dims, op, name_A, lora_A, f"of shape [{names}r, K]")
        need_value(False, op, name_B, lora_B, f"of shape [{names}N, r]")
    *stack, rank, _ = lora_A.shape
    features_out = lora_B.shape[-2]
    need_value(rank > 0, op, name_A, lora_A, "of rank r >= 1")
    need_value(features_out > 0, op, name_B, lora_B, "of at least one output feature, N >= 1")
    shape(op, name_A, lora_A, (*stack, rank, x.shape[-1]), f"[{names}r, K]")
    shape(op, name_B, lora_B, (*stack, features_out, rank), f"[{names}N, r]")
    like(op, name_A, lora_A, x, dtype=False, other=other)
    like(op, name_B, lora_B, x, dtype=False, other=other)
    like(op, name_B, lora_B, lora_A, other=name_A)
    no_wider(op, name_A, lora_A, x, other)


def no_wider(op: str, argument: str, tensor: torch.Tensor, x: torch.Tensor, other: str = "x") -> None:
    """float64 adapters go with float64 activations only, since sums are formed in float32 for all others."""
    if tensor.dtype == torch.float64 != x.dtype:
        need_value(False, op, argument, tensor, f"no wider than float32 while {other} is {x.dtype}", TypeError)


def linear(
    op: str,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    called: tuple[str, str] = ("weight", "bias"),
    fits_others: bool = False,
) -> None:
    """x [..., K], weight [N, K] and bias [N] of one floating dtype on one device. The op calls the latter two by the
    names in `called`. x is blamed where the first two differ, unless it fits other weights."""
    name, name_bias = called
    floating(op, "x", x)
    floating(op, name, weight)
    features(op, "x", x)
    need_value(weight.dim() == 2 and weight.numel() > 0, op, name, weight, "of shape [N, K] with N, K >= 1")
    if fits_others:
        shape(op, name, weight, (weight.shape[0], x.shape[-1]), "[N, K]")
        like(op, name, weight, x)
    else:
        size = weight.shape[1]
        need_value(x.shape[-1] == size, op, "x", x, f"of shape [..., K] with K = {size}, as {name} has")
        like(op, "x", x, weight, other=name)
    if bias is not None:
        floating(op, name_bias, bias)
        shape(op, name_bias, bias, (weight.shape[0],), "[N]")
        like(op, name_bias, bias, x)


def vector(
    op: str, argument: str, tensor: torch.Tensor, size: int, name: str, x: torch.Tensor, other: str = "x"
) -> None:
    """Floating, of shape [size], on x's device, no wider than its sums."""
    floating(op, argument, tensor)
    shape(op, argument, tensor, (size,), f"[{name}]")
    like(op, argument, tensor, x, dtype=False, other=other)
    no_wider(op, argument, tensor, x, other)


def dropout(op: str, p: float) -> None:
    need_value(isinstance(p, (int, float, Real)) and 0 <= p < 1, op, "dropout_p", p, "a probability with 0 <= p < 1")


def number(op: str, argument: str, value) -> None:
    """A finite number; while compiling, where it may be symbolic, any number."""
    needed = "a finite number"
    if not isinstance(value, (int, float, Real)):
        need_value(False, op, argument, value, needed, TypeError)
    if not torch.compiler.is_compiling():
        need_value(math.isfinite(value), op, argument, value, needed)


def whole(value) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def count(op: str, argument: str, value) -> None:
    need_value(whole(value) and value > 0, op, argument, value, "an integer >= 1")


def in_place(op: str, y: torch.Tensor, **others: torch.Tensor) -> None:
    """y is written in place: nobody may differentiate with respect to what it holds as a leaf, and its elements must be
    distinct and lie apart from every other argument's."""
    if torch.compiler.is_compiling() or y.numel() == 0:
        return
    if torch._C._are_functorch_transforms_active():  # whose tensors show no memory
        return
    if y.requires_grad and y.is_leaf and torch.is_grad_enabled():
        need(False, op, "y", "a leaf that requires grad", "no such leaf, since it is written in place", RuntimeError)
    if y.is_inference() and not torch.is_inference_mode_enabled():
        given = "an inference tensor outside torch.inference_mode"
        need(False, op, "y", given, "an ordinary tensor, since it is written in place", RuntimeError)
    if not y.is_contiguous() and any(stride == 0 and size > 1 for size, stride in zip(y.shape, y.stride())):
        given = f"a tensor whose elements share memory (shape {list(y.shape)}, strides {list(y.stride())})"
        need(False, op, "y", given, "a tensor of distinct elements, since it is written in place: call .contiguous()")
    storage = y.untyped_storage()
    if storage.device.type == "meta":  # nothing lies anywhere
        return
    for name, other in others.items():
        if other.untyped_storage().data_ptr() == storage.data_ptr() and _overlap(y, other):
            given = f"overlapping {name} in memory"
            need(False, op, "y", given, f"apart from {name}: it is written in place")


def _overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors of one storage may share an element; exact for columns of one row-major matrix."""
    if b.numel() == 0 or a.data_ptr() + _extent(a) <= b.data_ptr() or b.data_ptr() + _extent(b) <= a.data_ptr():
        return False
    a, b = a.squeeze(), b.squeeze()
    if a.dtype != b.dtype or a.stride() != b.stride() or a.dim() < 2 or a.stride(-1) != 1:
        return True
    row = min(a.stride()[:-1])
    if row == 0 or any(stride % row for stride in a.stride()[:-1]):
        return True
    gap = (b.data_ptr() - a.data_ptr()) // a.element_size() % row
    return gap < a.shape[-1] or gap + b.shape[-1] > row


def _extent(tensor: torch.Tensor) -> int:
    """Bytes from a tensor's first element to the end of its last."""
    return (1 + sum((n - 1) * abs(s) for n, s in zip(tensor.shape, tensor.stride()))) * tensor.element_size()


def values_on(device: torch.device) -> bool:
    """Whether to look at values of tensors on `device`: always on the CPU; elsewhere, where it would synchronise
    the device, only under PYFASTPEFT_CHECK=1; never while compiling."""
    if torch.compiler.is_compiling():
        return False
    return device.type == "cpu" or os.environ.get("PYFASTPEFT_CHECK") == "1"
