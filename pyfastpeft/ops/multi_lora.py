"""Batched multi-LoRA: every token goes through the adapter in its slot (Chen et al. 2023, Punica, section 4)."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.graph import increment_version

from . import checks, dispatch, host, native_calls, reference
from .arguments import (
    as_rows,
    autocast_off,
    autocasting,
    cast_for_autocast,
    first_order,
    needs_gradient,
    shaped,
    without_autocast,
    writable_rows,
    written,
    zero,
)


class Routing(NamedTuple):
    """Tokens grouped by adapter: made once a step by `route`, used by every layer."""

    order: Tensor  # [T] int64: tokens sorted by slot, stably; base-only tokens first
    segments: Tensor  # [L + 1] int64: adapter a's tokens are order[segments[a] : segments[a + 1]]


def route(
    slots: Tensor | np.ndarray | Sequence[int], num_adapters: int, device: torch.device | str | None = None
) -> Routing:
    """Group tokens by adapter.

    Args:
        slots: [T] integers in [-1, num_adapters), in any order; -1 is base only. A tensor is grouped where it lies; a
            list or NumPy array is grouped on the host and sent to `device` (default: the CPU).
        num_adapters: L.

    Raises TypeError for slots that are not integers, ValueError for a slot out of range. The values of tensors that
    are not on the CPU are looked at only under PYFASTPEFT_CHECK=1; out of range there, a token goes to no adapter.
    """
    op = "route"
    checks.count(op, "num_adapters", num_adapters)
    if not isinstance(slots, Tensor):
        try:
            slots = np.asarray(slots)
        except ValueError:  # rows of different lengths
            checks.need_value(False, op, "slots", slots, "of shape [T]")
        if slots.size == 0:
            slots = slots.astype(np.int64)
        checks.need(slots.dtype.kind in "iu", op, "slots", f"of dtype {slots.dtype}", "of integers", TypeError)
        checks.need(slots.ndim == 1, op, "slots", f"of shape {list(slots.shape)}", "of shape [T]")
        check_range(op, slots, num_adapters)
        device, grouped = torch.device(device or "cpu"), host.group_tokens(slots, num_adapters)
        # CUDA has read ordinary memory when a copy returns: nothing waits for the device. A captured copy would read it
        # at every replay, and is left to fail.
        at_once = device.type == "cuda" and not torch.cuda.is_current_stream_capturing()
        return Routing(*(torch.from_numpy(array).to(device, non_blocking=at_once) for array in grouped))
    return _grouped(op, slots, num_adapters)


def _grouped(op: str, slots: Tensor, num_adapters: int) -> Routing:
    checks.integral(op, "slots", slots)
    checks.need_value(slots.dim() == 1, op, "slots", slots, "of shape [T]")
    slots = slots.to(torch.int64).contiguous()
    if checks.values_on(slots.device):
        check_range(op, slots, num_adapters)
    order = slots.new_empty(slots.shape[0], dtype=torch.int64)
    segments = slots.new_empty(num_adapters + 1, dtype=torch.int64)
    dispatch.run("group_tokens", slots, order, segments)
    return Routing(order, segments)


def check_range(op, slots, num_adapters):
    if slots.shape[0] == 0:
        return
    low, high = slots.aminmax() if isinstance(slots, Tensor) else (slots.min(), slots.max())
    if low < -1 or high >= num_adapters:
        given = f"between {int(low)} and {int(high)}"
        checks.need(False, op, "slots", given, f"in [-1, {num_adapters}) (-1: base only)")


def _forward(y, x, weight, bias, lora_A, lora_B, scaling, ranks, order, segments):
    """(y, s, backend). With weight, y is None and the result is new; without, y is written in place."""
    rows, backend = as_rows(x), None
    s = rows.new_empty(rows.shape[0], lora_A.shape[1], dtype=reference.accumulation(x.dtype))
    if weight is not None:
        y = rows.new_empty(*x.shape[:-1], weight.shape[0])
    if rows.shape[0]:
        arguments = rows, weight, bias, lora_A, lora_B, scaling, ranks, order, segments
        backend = dispatch.run("multi_lora_forward", *arguments, y.view(-1, y.shape[-1]), s)
    return y, s, backend


class _MultiLoRA(Function):
    @staticmethod
    def forward(ctx, y, x, weight, bias, lora_A, lora_B, scaling, ranks, order, segments):
        if weight is None:
            ctx.mark_dirty(y)
        y, s, backend = _forward(y, x, weight, bias, lora_A, lora_B, scaling, ranks, order, segments)
        _, _, need_weight, _, need_A, need_B, *_ = ctx.needs_input_grad
        kept = x if need_A or need_weight else None, s if need_B else None
        ctx.save_for_backward(*kept, weight, lora_A, lora_B, scaling, ranks, order, segments)
        ctx.options = backend, x.shape
        return y

    @staticmethod
    @first_order
    @without_autocast
    def backward(ctx, dy):
        x, s, weight, lora_A, lora_B, scaling, ranks, order, segments = ctx.saved_tensors
        backend, shape = ctx.options
        need_y, need_x, need_weight, need_bias, need_A, need_B, *_ = ctx.needs_input_grad
        dy_rows = as_rows(dy)
        x_rows = None if x is None else as_rows(x)
        dx = dy_rows.new_empty(dy_rows.shape[0], shape[-1]) if need_x else None
        dlora_A = torch.empty_like(lora_A) if need_A else None
        dlora_B = torch.empty_like(lora_B) if need_B else None
        if dy.numel() == 0:
            zero(dlora_A, dlora_B)
        elif need_x or need_A or need_B:
            arguments = dy_rows, x_rows, weight, lora_A, lora_B, scaling, ranks, order, segments, s
            dispatch.run("multi_lora_backward", *arguments, dx, dlora_A, dlora_B, backend=backend)
        dweight = dy_rows.T @ x_rows if need_weight else None
        dbias = dy_rows.sum(0) if need_bias else None
        return (dy if need_y else None), shaped(dx, shape), dweight, dbias, dlora_A, dlora_B, *[None] * 4


def multi_lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    slots: Tensor | Routing,
    scaling: Tensor | float,
    ranks: Tensor | None = None,
) -> Tensor:
    """y[t] = x[t] weight^T + bias + scaling[a] * x[t] lora_A[a]^T lora_B[a]^T with a = slots[t]; for slot -1 the base
    layer alone (Chen et al. 2023, section 4).

    Args:
        x: [..., K], float64, float32, bfloat16 or float16, any strides; T tokens in all.
        weight: [N, K], of x's dtype; any strides.
        bias: [N], of x's dtype, or None.
        lora_A, lora_B, slots, scaling, ranks: as in `multi_lora`.

    Returns y [..., N] in x's dtype. Gradients reach x, lora_A, lora_B and, where they require it, weight and bias. Kept
    for the backward pass: x and s = x lora_A^T [T, r]. Under autocast x, weight and bias are cast first. Raises as
    `multi_lora` does.
    """
    order, segments = slots if type(slots) is Routing else (slots, None)
    scalings, number = (None, scaling) if type(scaling) is float else (scaling, 0.0)
    tensors = x, weight, bias, lora_A, lora_B, order, segments, scalings, ranks
    if (
        scaling is not None
        and native_calls.mode(*tensors) == "inference"
        and (y := native_calls.multi_lora_call(*tensors[:-1], number, ranks)) is not None
    ):
        return y
    op = "multi_lora_linear"
    checks.floating(op, "x", x)
    if autocasting(x):
        cast = cast_for_autocast(x, weight, bias)
        with autocast_off(x):
            return multi_lora_linear(*cast, lora_A, lora_B, slots, scaling, ranks)
    checks.linear(op, x, weight, bias)
    checks.adapters(op, lora_A, lora_B, x, lead=("L",))
    checks.shape(op, "lora_B", lora_B, (lora_A.shape[0], weight.shape[0], lora_A.shape[1]), "[L, N, r]")
    bias = None if bias is None else bias.contiguous()
    branch = _branch(op, x, lora_A, lora_B, slots, scaling, ranks)
    if dispatch.composed():
        return _composed(x, F.linear(x, weight, bias), *branch)
    arguments = x, weight, bias, *branch
    if needs_gradient(x, weight, bias, lora_A, lora_B):
        return _MultiLoRA.apply(None, *arguments)
    y, *_ = _forward(None, *arguments)
    return y


def multi_lora(
    y: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    slots: Tensor | Routing,
    scaling: Tensor | float,
    ranks: Tensor | None = None,
) -> Tensor:
    """y[t] += scaling[a] * x[t] lora_A[a]^T lora_B[a]^T with a = slots[t], in place; slot -1 leaves y[t] as it is.

    Args:
        y: [..., N], the output of the base layer, of x's leading dimensions (T tokens in all); written in place, so
            its elements must be distinct and lie apart from the other arguments in memory.
        x: [..., K], of y's dtype; under autocast it is cast to it.
        lora_A: [L, r, K]; lora_B: [L, N, r]: stacked adapters of one float dtype, which may differ from x's.
        slots: [T] integers in [-1, L), in any order, or the `Routing` that `route` made of them.
        scaling: [L], or one number for all adapters. It gets no gradient.
        ranks: [L] integers in [0, r], the true rank of every adapter: the rest of its r rows is not read, and gets
            gradient zero. None: r for all.

    Returns y. Gradients reach y, x, lora_A and lora_B; base-only tokens and idle adapters get zero. Raises ValueError
    or TypeError naming the argument that does not fit. Values of `slots` and `ranks` that are not on the CPU are
    looked at only under PYFASTPEFT_CHECK=1, since that synchronises the device; without it a slot out of range
    counts as base only, a rank out of range as the nearest one in it.
    """
    order, segments = slots if type(slots) is Routing else (slots, None)
    scalings, number = (None, scaling) if type(scaling) is float else (scaling, 0.0)
    if (
        scaling is not None
        and native_calls.mode(y, x, lora_A, lora_B, order, segments, scalings, ranks) == "inference"
        and native_calls.writable(y)
        and native_calls.multi_lora_call_(y, x, lora_A, lora_B, order, segments, scalings, number, ranks)
    ):
        increment_version(y)
        return y
    op = "multi_lora"
    checks.floating(op, "y", y)
    checks.floating(op, "x", x)
    checks.features(op, "x", x)
    if autocasting(x):
        with autocast_off(x):
            return multi_lora(y, x.to(y.dtype), lora_A, lora_B, slots, scaling, ranks)
    checks.adapters(op, lora_A, lora_B, x, lead=("L",))
    checks.shape(op, "y", y, (*x.shape[:-1], lora_B.shape[1]), "[..., N]")
    checks.like(op, "y", y, x)
    checks.in_place(op, y, x=x, lora_A=lora_A, lora_B=lora_B)
    branch = _branch(op, x, lora_A, lora_B, slots, scaling, ranks)
    if dispatch.composed():
        return y.copy_(_composed(x, y, *branch))
    arguments = x, None, None, *branch
    rows = writable_rows(y)
    if needs_gradient(y, x, lora_A, lora_B):
        rows = _MultiLoRA.apply(rows, *arguments)
    else:
        _forward(rows, *arguments)
        written(rows)
    return rows if rows is y else y.copy_(rows)


def _composed(x, base, *branch):
    rows = x.reshape(-1, x.shape[-1]), base.reshape(-1, base.shape[-1])
    return reference.multi_lora(*rows, *branch)[0].reshape(base.shape)


def _branch(op, x, lora_A, lora_B, slots, scaling, ranks):
    """(lora_A, lora_B, scaling, ranks, order, segments) as the raw ops take them; the factors are checked."""
    num_adapters, rank, _ = lora_A.shape
    checks.need_value(num_adapters > 0, op, "lora_A", lora_A, "of at least one adapter, L >= 1")
    tokens = math.prod(x.shape[:-1])
    if not isinstance(slots, Routing):
        needed = "a tensor of T integers or a Routing"
        checks.need_value(isinstance(slots, Tensor), op, "slots", slots, needed, TypeError)
        checks.shape(op, "slots", slots, (tokens,), "[T]")
        checks.like(op, "slots", slots, x, dtype=False)
        slots = _grouped(op, slots, num_adapters)
    checks.integers(op, "slots.order [T]", slots.order, tokens, x)
    checks.integers(op, "slots.segments [L + 1]", slots.segments, num_adapters + 1, x)
    wide = reference.accumulation(x.dtype)
    if isinstance(scaling, Tensor):
        checks.floating(op, "scaling", scaling)
        checks.shape(op, "scaling", scaling, (num_adapters,), "[L]")
        checks.like(op, "scaling", scaling, x, dtype=False)
        scaling = scaling.detach().to(wide).contiguous()
    else:
        checks.number(op, "scaling", scaling)
        scaling = x.new_full((num_adapters,), scaling, dtype=wide)
    if ranks is not None:
        ranks = _check_ranks(op, ranks, num_adapters, rank, x)
    if x.dtype == torch.float64:
        lora_A, lora_B = lora_A.double(), lora_B.double()
    return lora_A.contiguous(), lora_B.contiguous(), scaling, ranks, slots.order, slots.segments


def _check_ranks(op, ranks, num_adapters, rank, x):
    checks.integral(op, "ranks", ranks)
    checks.shape(op, "ranks", ranks, (num_adapters,), "[L]")
    checks.like(op, "ranks", ranks, x, dtype=False)
    ranks = ranks.to(torch.int64).contiguous()
    if checks.values_on(ranks.device):
        given = f"between {int(ranks.min())} and {int(ranks.max())}"
        checks.need(bool(((ranks >= 0) & (ranks <= rank)).all()), op, "ranks", given, f"in [0, r] = [0, {rank}]")
    return ranks
