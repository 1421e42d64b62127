"""Bottleneck adapters: y = residual + scaling * phi(x down^T + down_bias) up^T + up_bias (Houlsby et al. 2019; He et
al. 2022, table 1)."""

import torch
from torch import Tensor
from torch.autograd import Function

from . import checks, dispatch, reference
from .arguments import as_rows, autocast_off, autocasting, first_order, needs_gradient, shaped, without_autocast, zero


def _forward(x, residual, down, down_bias, up, up_bias, scaling, activation):
    """(y, s, backend). A residual that is None is x."""
    rows, backend = as_rows(x), None
    residual_rows = rows if residual is None else as_rows(residual)
    y = rows.new_empty(*x.shape[:-1], up.shape[0])
    s = rows.new_empty(rows.shape[0], down.shape[0], dtype=reference.accumulation(x.dtype))
    if rows.numel():
        out = y.view(-1, up.shape[0])
        arguments = rows, residual_rows, down, down_bias, up, up_bias, scaling, activation, out, s
        backend = dispatch.run("bottleneck_forward", *arguments)
    return y, s, backend


class _Bottleneck(Function):
    @staticmethod
    def forward(ctx, x, residual, down, down_bias, up, up_bias, scaling, activation):
        y, s, backend = _forward(x, residual, down, down_bias, up, up_bias, scaling, activation)
        ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, down, down_bias, up, s)
        ctx.options = backend, scaling, activation, residual is None, x.shape
        return y

    @staticmethod
    @first_order
    @without_autocast
    def backward(ctx, dy):
        x, down, down_bias, up, s = ctx.saved_tensors
        backend, scaling, activation, serial, shape = ctx.options
        need_x, need_residual, need_down, need_down_bias, need_up, need_up_bias, *_ = ctx.needs_input_grad
        dy_rows = as_rows(dy)
        dx = dy_rows.new_empty(dy_rows.shape[0], shape[-1]) if need_x else None
        ddown, ddown_bias, dup = (
            torch.empty_like(t) if need else None
            for t, need in ((down, need_down), (down_bias, need_down_bias), (up, need_up))
        )
        if dy.numel() == 0:
            zero(ddown, ddown_bias, dup)
        elif need_x or need_down or need_down_bias or need_up:
            x_rows = None if x is None else as_rows(x)
            given = dy_rows, x_rows, down, down_bias, up, scaling, activation, s, serial
            dispatch.run("bottleneck_backward", *given, dx, ddown, ddown_bias, dup, backend=backend)
        dup_bias = dy_rows.sum(0, dtype=s.dtype) if need_up_bias else None
        return shaped(dx, shape), (dy if need_residual else None), ddown, ddown_bias, dup, dup_bias, None, None


def bottleneck(
    x: Tensor,
    residual: Tensor,
    down: Tensor,
    down_bias: Tensor | None,
    up: Tensor,
    up_bias: Tensor | None,
    scaling: float | Tensor,
    activation: str = "relu",
) -> Tensor:
    """y = residual + scaling * phi(x down^T + down_bias) up^T + up_bias  (Houlsby et al. 2019; with a scale and beside
    the sub-layer, He et al. 2022, table 1). up_bias is not scaled.

    Args:
        x: [..., K], float64, float32, bfloat16 or float16, any strides: what the adapter sees.
        residual: [..., N] of x's dtype: what it is added to, and not written. It may be x itself (a serial adapter).
        down: [r, K]; down_bias: [r] or None; up: [N, r]; up_bias: [N] or None: of one float dtype, which may differ
            from x's: the kernels cast, and sum in float32 (float64 for float64).
        scaling: a number, or a tensor [1] that is learned: it then gets a gradient.
        activation: phi, one of "relu", "gelu" (with erf), "gelu_tanh", "silu", "tanh" and "identity".

    Returns y [..., N] in x's dtype. Gradients reach x, residual, down, down_bias, up, up_bias and a learned scaling.
    Kept for the backward pass: x and x down^T [M, r]. Under autocast x is cast to residual's dtype. Raises ValueError
    or TypeError naming the argument that does not fit.
    """
    op = "bottleneck"
    checks.floating(op, "x", x)
    checks.floating(op, "residual", residual)
    if autocasting(x):
        with autocast_off(x):
            seen = residual if residual is x else x.to(residual.dtype)
            return bottleneck(seen, residual, down, down_bias, up, up_bias, scaling, activation)
    checks.features(op, "x", x)
    checks.adapters(op, down, up, x, called=("down", "up"))
    checks.shape(op, "residual", residual, (*x.shape[:-1], up.shape[0]), "[..., N]")
    checks.like(op, "residual", residual, x)
    for name, bias, size, letter in (("down_bias", down_bias, len(down), "r"), ("up_bias", up_bias, len(up), "N")):
        if bias is not None:
            checks.vector(op, name, bias, size, letter, x)
            checks.like(op, name, bias, down, other="down")
    known = tuple(reference.ACTIVATIONS)
    checks.need_value(activation in known, op, "activation", activation, f"one of {', '.join(known)}")
    if isinstance(scaling, Tensor):
        checks.vector(op, "scaling", scaling.reshape(-1), 1, "1", x)
        up, scaling = (up * scaling).to(up.dtype), 1.0
    else:
        checks.number(op, "scaling", scaling)
    adapters = down, down_bias, up, up_bias
    if x.dtype == torch.float64:
        adapters = [None if t is None else t.double() for t in adapters]
    down, down_bias, up, up_bias = (None if t is None else t.contiguous() for t in adapters)
    if dispatch.composed():
        return reference.bottleneck(x, residual, down, down_bias, up, up_bias, float(scaling), activation)[0]
    arguments = x, None if residual is x else residual, down, down_bias, up, up_bias, float(scaling), activation
    if needs_gradient(x, residual, down, down_bias, up, up_bias):
        return _Bottleneck.apply(*arguments)
    return _forward(*arguments)[0]
