"""LoRA on a linear layer: y = x W^T + b + scaling * drop(x) A^T B^T (Hu et al. 2021, equation 3)."""

from contextlib import suppress

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.graph import increment_version

from . import checks, dispatch, native_calls, reference
from .arguments import (
    as_rows,
    autocast_off,
    autocasting,
    cast_for_autocast,
    dropout_seed,
    first_order,
    masked,
    needs_gradient,
    shaped,
    without_autocast,
    writable_rows,
    written,
    zero,
)


def _forward(y, x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed):
    """(y, s, backend). With weight, y is None and the result is new; without, y is written in place."""
    rows, backend = as_rows(x), None
    s = rows.new_empty(rows.shape[0], lora_A.shape[0], dtype=reference.accumulation(x.dtype))
    if weight is not None:
        y = rows.new_empty(*x.shape[:-1], weight.shape[0])
    if rows.numel():
        out = y.view(-1, y.shape[-1])
        backend = dispatch.run("lora_forward", rows, weight, bias, lora_A, lora_B, scaling, dropout_p, seed, out, s)
    return y, s, backend


def _gradients(dy, x, weight, lora_A, lora_B, scaling, dropout_p, seed, s, need_x, need_A, need_B, shape, backend):
    """(dx, dlora_A, dlora_B), where they are needed."""
    if backend in (None, "cpu") and native_calls.mode(dy, x, weight, lora_A, lora_B, seed, s):
        arguments = dy, x, weight, lora_A, lora_B, scaling, dropout_p, seed, s
        found = native_calls.lora_gradients(*arguments, need_x, need_A, need_B)
        if any([gradient is not None for gradient in found]):
            return found
    rows, x_rows = as_rows(dy), None if x is None else as_rows(x)
    dx = rows.new_empty(rows.shape[0], shape[-1]) if need_x else None
    dlora_A = torch.empty_like(lora_A) if need_A else None
    dlora_B = torch.empty_like(lora_B) if need_B else None
    if dy.numel():
        arguments = rows, x_rows, weight, lora_A, lora_B, scaling, dropout_p, seed, s, dx, dlora_A, dlora_B
        dispatch.run("lora_backward", *arguments, backend=backend)
    else:
        zero(dlora_A, dlora_B)
    return shaped(dx, shape), dlora_A, dlora_B


class _LoRA(Function):
    @staticmethod
    def forward(ctx, y, x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed, unchecked=False):
        if weight is None:
            ctx.mark_dirty(y)
        if unchecked:
            y, s = native_calls.lora_call_with_s(x, weight, bias, lora_A, lora_B, scaling)
            backend = dispatch.forced_backend()
            if y is None:
                raise native_calls.Declined
        else:
            y, s, backend = _forward(y, x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed)
        _, _, need_weight, _, need_A, need_B, *_ = ctx.needs_input_grad
        ctx.save_for_backward(x if need_A or need_weight else None, weight, lora_A, lora_B, s if need_B else None, seed)
        ctx.options = backend, scaling, dropout_p, x.shape
        return y

    @staticmethod
    @first_order
    @without_autocast
    def backward(ctx, dy):
        x, weight, lora_A, lora_B, s, seed = ctx.saved_tensors
        backend, scaling, dropout_p, shape = ctx.options
        need_y, need_x, need_weight, need_bias, need_A, need_B, *_ = ctx.needs_input_grad
        needs = need_x, need_A, need_B
        arguments = dy, x, weight, lora_A, lora_B, scaling, dropout_p, seed, s
        dx, dlora_A, dlora_B = _gradients(*arguments, *needs, shape, backend) if any(needs) else (None, None, None)
        dweight = as_rows(dy).T @ as_rows(x) if need_weight else None
        dbias = as_rows(dy).sum(0) if need_bias else None
        return (dy if need_y else None), dx, dweight, dbias, dlora_A, dlora_B, None, None, None, None


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
) -> Tensor:
    """y = x weight^T + bias + scaling * drop(x) lora_A^T lora_B^T  (Hu et al. 2021, equation 3).

    Args:
        x: [..., K], float64, float32, bfloat16 or float16, any strides.
        weight: [N, K], of x's dtype; any strides (a transposed Conv1D weight is not copied).
        bias: [N], of x's dtype, or None.
        lora_A: [r, K]; lora_B: [N, r]: both of one float dtype, which may differ from x's (PEFT keeps adapters in
            float32 on a bfloat16 base): the kernels cast, and sum in float32 (float64 for float64).
        scaling: the factor s, alpha / r in LoRA.
        dropout_p: in [0, 1): the share of x's elements that the low-rank branch does not see; the others are
            scaled by 1 / (1 - p). The mask follows from one drawn 64-bit seed (`reference.dropout_factor`); where no
            kernel draws it, torch does, and keeps it and what it leaves of x.

    Returns y [..., N] in x's dtype. Gradients reach x, lora_A, lora_B and, where they require it, weight and bias.
    Kept for the backward pass: x, s = drop(x) lora_A^T [M, r] and the seed. Under autocast x, weight and bias are
    cast first. Raises ValueError or TypeError naming the argument that does not fit.
    """
    if (
        type(scaling) is type(dropout_p) is float
        and dropout_p == 0.0
        and (mode := native_calls.mode(x, weight, bias, lora_A, lora_B))
    ):
        if mode == "training":
            with suppress(native_calls.Declined):
                return _LoRA.apply(None, x, weight, bias, lora_A, lora_B, scaling, 0.0, None, True)
        elif (y := native_calls.lora_call(x, weight, bias, lora_A, lora_B, scaling)) is not None:
            return y
    op = "lora_linear"
    checks.floating(op, "x", x)
    if autocasting(x):
        cast = cast_for_autocast(x, weight, bias)
        with autocast_off(x):
            return lora_linear(*cast, lora_A, lora_B, scaling, dropout_p)
    checks.linear(op, x, weight, bias)
    checks.adapters(op, lora_A, lora_B, x)
    checks.shape(op, "lora_B", lora_B, (weight.shape[0], lora_A.shape[0]), "[N, r]")
    return _apply(op, None, x, weight, bias, lora_A, lora_B, scaling, dropout_p)


def lora_delta_(y: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, dropout_p: float = 0.0) -> Tensor:
    """y += scaling * drop(x) lora_A^T lora_B^T, in place: the low-rank branch on the output of any base layer.

    Args:
        y: [..., N], the output of the base layer (quantised, sharded, foreign), of the same leading dimensions as x;
            any strides, but its elements must be distinct and lie apart from x, lora_A and lora_B in memory.
        x: [..., K], of y's dtype; under autocast it is cast to it.
        lora_A, lora_B, scaling, dropout_p: as in `lora_linear`.

    Returns y. Gradients reach y, x, lora_A and lora_B. Raises ValueError or TypeError naming the argument that does
    not fit.
    """
    if (
        type(scaling) is type(dropout_p) is float
        and dropout_p == 0.0
        and native_calls.mode(y, x, lora_A, lora_B) == "inference"
        and native_calls.writable(y)
        and native_calls.lora_call_(y, x, lora_A, lora_B, scaling)
    ):
        increment_version(y)
        return y
    op = "lora_delta_"
    checks.floating(op, "y", y)
    checks.floating(op, "x", x)
    checks.features(op, "x", x)
    if autocasting(x):
        with autocast_off(x):
            return lora_delta_(y, x.to(y.dtype), lora_A, lora_B, scaling, dropout_p)
    checks.adapters(op, lora_A, lora_B, x)
    checks.shape(op, "y", y, (*x.shape[:-1], lora_B.shape[0]), "[..., N]")
    checks.like(op, "y", y, x)
    checks.in_place(op, y, x=x, lora_A=lora_A, lora_B=lora_B)
    rows = _apply(op, writable_rows(y), x, None, None, lora_A, lora_B, scaling, dropout_p)
    return rows if rows is y else y.copy_(rows)


def _apply(op, y, x, weight, bias, lora_A, lora_B, scaling, dropout_p):
    checks.number(op, "scaling", scaling)
    checks.dropout(op, dropout_p)
    if x.dtype == torch.float64:
        lora_A, lora_B = lora_A.double(), lora_B.double()
    bias = None if bias is None else bias.contiguous()
    scaling, dropout_p = float(scaling), float(dropout_p)
    if dispatch.composed():
        base = y if weight is None else F.linear(x, weight, bias)
        return reference.lora(x, base, lora_A, lora_B, scaling, dropout_p, dropout_seed(x, dropout_p))[0]
    arguments = y, x, weight, bias, lora_A.contiguous(), lora_B.contiguous(), scaling, dropout_p
    if dropout_p and x.numel() and not dispatch.has_kernel("lora_forward", (x, weight, *arguments[3:], True)):
        rows = as_rows(x)  # whose product is no view, into which no Function may write
        base = F.linear(rows, weight, bias) if y is None else y
        branch = lora_A, lora_B, scaling / (1 - dropout_p), 0.0
        out = _apply(op, base, masked(rows, dropout_p), None, None, *branch)
        return shaped(out, (*x.shape[:-1], len(lora_B))) if y is None else out
    seed = dropout_seed(x, dropout_p)
    if needs_gradient(y, x, weight, bias, lora_A, lora_B):
        return _LoRA.apply(*arguments, seed)
    out, *_ = _forward(*arguments, seed)
    if weight is None:
        written(out)
    return out
