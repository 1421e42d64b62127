"""IA3 on a linear layer: elementwise rescaling of its input or its output (Liu et al. 2022, section 3.3)."""

from contextlib import suppress

import torch
from torch import Tensor
from torch.autograd import Function

from . import checks, dispatch, native_calls, reference
from .arguments import (
    as_rows,
    autocast_off,
    autocasting,
    cast_for_autocast,
    first_order,
    needs_gradient,
    shaped,
    without_autocast,
)


def _forward(x, weight, bias, ia3_l, feedforward, keep_base):
    """(y, base, backend); base is the unscaled output, or None."""
    rows, backend = as_rows(x), None
    y = rows.new_empty(*x.shape[:-1], weight.shape[0])
    base = rows.new_empty(rows.shape[0], weight.shape[0]) if keep_base else None
    if rows.numel():
        out = y.view(-1, weight.shape[0])
        backend = dispatch.run("ia3_forward", rows, weight, bias, ia3_l, feedforward, out, base)
    return y, base, backend


def _gradients(dy, x, weight, ia3_l, feedforward, base, need_x, need_l, shape, backend):
    """(dx, dia3_l), where they are needed."""
    if backend in (None, "cpu") and native_calls.mode(dy, x, weight, ia3_l, base):
        dx, dia3_l = native_calls.ia3_gradients(dy, x, weight, ia3_l, feedforward, base, need_x, need_l)
        if dx is not None or dia3_l is not None:
            return dx, dia3_l
    dy_rows = as_rows(dy)
    x_rows = None if x is None else as_rows(x)
    dx = dy_rows.new_empty(dy_rows.shape[0], shape[-1]) if need_x else None
    dia3_l = torch.empty_like(ia3_l) if need_l else None
    if dy.numel():
        arguments = dy_rows, x_rows, weight, ia3_l, feedforward, base, dx, dia3_l
        dispatch.run("ia3_backward", *arguments, backend=backend)
    elif need_l:
        dia3_l.zero_()
    return shaped(dx, shape), dia3_l


class _IA3(Function):
    @staticmethod
    def forward(ctx, x, weight, bias, ia3_l, feedforward, unchecked=False):
        _, need_weight, _, need_l, *_ = ctx.needs_input_grad
        keep_base = need_l and not feedforward
        if unchecked:
            y, base = native_calls.ia3_call(x, weight, bias, ia3_l, feedforward, keep_base)
            backend = dispatch.forced_backend()
            if y is None:
                raise native_calls.Declined
        else:
            y, base, backend = _forward(x, weight, bias, ia3_l, feedforward, keep_base)
        keep_x = need_weight or (need_l and feedforward)
        ctx.save_for_backward(x if keep_x else None, weight, ia3_l, base)
        ctx.options = backend, feedforward, x.shape
        return y

    @staticmethod
    @first_order
    @without_autocast
    def backward(ctx, dy):
        x, weight, ia3_l, base = ctx.saved_tensors
        backend, feedforward, shape = ctx.options
        need_x, need_weight, need_bias, need_l, *_ = ctx.needs_input_grad
        dx = dia3_l = None
        if need_x or need_l:
            arguments = dy, x, weight, ia3_l, feedforward, base, need_x, need_l
            dx, dia3_l = _gradients(*arguments, shape, backend)
        if not (need_weight or need_bias):
            return dx, None, None, dia3_l, None, None
        dy_rows = as_rows(dy)
        x_rows = None if x is None else as_rows(x)
        dbase = dy_rows if feedforward else (dy_rows * ia3_l).to(dy.dtype)
        inner = (x_rows * ia3_l).to(dy.dtype) if need_weight and feedforward else x_rows
        dweight = dbase.T @ inner if need_weight else None
        dbias = dbase.sum(0) if need_bias else None
        return dx, dweight, dbias, dia3_l, None, None


def ia3_linear(x: Tensor, weight: Tensor, bias: Tensor | None, ia3_l: Tensor, feedforward: bool) -> Tensor:
    """y = (x * ia3_l) weight^T + bias on feed-forward layers, else y = (x weight^T + bias) * ia3_l  (Liu et al. 2022).

    Args:
        x: [..., K], float64, float32, bfloat16 or float16, any strides.
        weight: [N, K]; bias: [N] or None: of x's dtype.
        ia3_l: [K] if feedforward, else [N]; any float dtype no wider than float32 or x's: products are rounded once.
        feedforward: whether the scale meets the input (of the feed-forward's down projection) or the output (keys
            and values).

    Returns y [..., N] in x's dtype. Gradients reach x, ia3_l and, where they require it, weight and bias. Kept for the
    backward pass: x (feedforward) or the unscaled output. Under autocast x, weight and bias are cast first. Raises
    ValueError or TypeError naming the argument that does not fit.
    """
    if type(feedforward) is bool and (mode := native_calls.mode(x, weight, bias, ia3_l)):
        if mode == "training":
            with suppress(native_calls.Declined):
                return _IA3.apply(x, weight, bias, ia3_l, feedforward, True)
        elif (y := native_calls.ia3_call(x, weight, bias, ia3_l, feedforward, False)[0]) is not None:
            return y
    op = "ia3_linear"
    checks.floating(op, "x", x)
    if autocasting(x):
        cast = cast_for_autocast(x, weight, bias)
        with autocast_off(x):
            return ia3_linear(*cast, ia3_l, feedforward)
    checks.linear(op, x, weight, bias)
    checks.vector(op, "ia3_l", ia3_l, weight.shape[1 if feedforward else 0], "K" if feedforward else "N", x)
    bias = None if bias is None else bias.contiguous()
    ia3_l = (ia3_l.double() if x.dtype == torch.float64 else ia3_l).contiguous()
    if dispatch.composed():
        return reference.ia3(x, weight, bias, ia3_l, feedforward)
    if needs_gradient(x, weight, bias, ia3_l):
        return _IA3.apply(x, weight, bias, ia3_l, bool(feedforward))
    return _forward(x, weight, bias, ia3_l, bool(feedforward), False)[0]
