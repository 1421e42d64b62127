"""DoRA on a linear layer: every output feature of W + scaling * B A scaled to a learned magnitude (Liu et al. 2024)."""

from contextlib import suppress

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

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
    zero,
)
from .lora import lora_delta_


def _forward(x, weight, bias, lora_A, lora_B, scale, scaling, dropout_p, seed, keep_unscaled):
    """(y, s, unscaled, backend); unscaled is the output without scale and bias, or None."""
    rows, features, backend = as_rows(x), weight.shape[0], None
    y = rows.new_empty(*x.shape[:-1], features)
    s = rows.new_empty(rows.shape[0], lora_A.shape[0], dtype=scale.dtype)
    unscaled = rows.new_empty(rows.shape[0], features) if keep_unscaled else None
    if rows.numel():
        out = y.view(-1, features)
        arguments = rows, weight, bias, lora_A, lora_B, scale, scaling, dropout_p, seed, out, s, unscaled
        backend = dispatch.run("dora_forward", *arguments)
    return y, s, unscaled, backend


def _gradients(
    dy, x, weight, lora_A, lora_B, scale, norm, scaling, dropout_p, seed, s, unscaled, needs, shape, backend
):
    """(dx, dlora_A, dlora_B, dmagnitude), where `needs` tells that they are needed."""
    tensors = x, weight, lora_A, lora_B, scale
    kept = scaling, dropout_p, seed, s, unscaled
    if backend in (None, "cpu") and native_calls.mode(dy, *tensors, norm, seed, s, unscaled):
        found = native_calls.dora_gradients(dy, *tensors, norm, *kept, *needs)
        if any([gradient is not None for gradient in found]):
            return found
    need_x, need_A, need_B, need_magnitude = needs
    rows, x_rows = as_rows(dy), None if x is None else as_rows(x)
    dx = rows.new_empty(rows.shape[0], shape[-1]) if need_x else None
    dlora_A = torch.empty_like(lora_A) if need_A else None
    dlora_B = torch.empty_like(lora_B) if need_B else None
    dscale = torch.empty_like(scale) if need_magnitude else None
    if dy.numel():
        arguments = rows, x_rows, weight, lora_A, lora_B, scale, *kept, dx, dlora_A, dlora_B, dscale
        dispatch.run("dora_backward", *arguments, backend=backend)
    else:
        zero(dlora_A, dlora_B, dscale)
    return shaped(dx, shape), dlora_A, dlora_B, dscale / norm if need_magnitude else None


class _DoRA(Function):
    """`norm` is None where the forward pass is to be one native call."""

    @staticmethod
    def forward(ctx, x, weight, bias, lora_A, lora_B, magnitude, norm, scaling, dropout_p, seed):
        _, need_weight, _, need_A, need_B, need_magnitude, *_ = ctx.needs_input_grad
        if norm is None:
            arguments = x, weight, bias, lora_A, lora_B, magnitude, scaling, need_magnitude
            y, s, unscaled, scale, norm = native_calls.dora_call(*arguments)
            backend = dispatch.forced_backend()
            if y is None:
                raise native_calls.Declined
        else:
            scale = magnitude / norm
            arguments = x, weight, bias, lora_A, lora_B, scale, scaling, dropout_p, seed
            y, s, unscaled, backend = _forward(*arguments, need_magnitude)
        kept_x, kept_s = x if need_A or need_weight else None, s if need_B else None
        ctx.save_for_backward(kept_x, weight, lora_A, lora_B, scale, norm, kept_s, unscaled, seed)
        ctx.options = backend, scaling, dropout_p, x.shape, magnitude.dtype
        return y

    @staticmethod
    @first_order
    @without_autocast
    def backward(ctx, dy):
        x, weight, lora_A, lora_B, scale, norm, s, unscaled, seed = ctx.saved_tensors
        backend, scaling, dropout_p, shape, dtype = ctx.options
        need_x, need_weight, need_bias, *need_adapter = ctx.needs_input_grad[:6]
        needs = need_x, *need_adapter
        dx = dlora_A = dlora_B = dmagnitude = None
        if any(needs):
            kept = scaling, dropout_p, seed, s, unscaled
            given = dy, x, weight, lora_A, lora_B, scale, norm, *kept, needs, shape, backend
            dx, dlora_A, dlora_B, dmagnitude = _gradients(*given)
        if dmagnitude is not None:
            dmagnitude = dmagnitude.to(dtype)
        dweight = (as_rows(dy) * scale).to(dy.dtype).T @ as_rows(x) if need_weight else None
        dbias = as_rows(dy).sum(0) if need_bias else None
        return dx, dweight, dbias, dlora_A, dlora_B, dmagnitude, None, None, None, None


@torch.no_grad()
def dora_norm(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, weight_norm_squared: Tensor | None = None
) -> Tensor:
    """||weight + scaling * lora_B lora_A|| of every row  (Liu et al. 2024, equation 5), without forming lora_B lora_A.

    It is the root of ||weight||^2 + 2 scaling <weight lora_A^T, lora_B> + scaling^2 <lora_B (lora_A lora_A^T), lora_B>,
    summed in float32: its square is off by a few float32 epsilons of the largest of the three terms, so that it is as
    exact as the norm of the sum unless the adapter all but cancels a row of the weight. A square below 0 counts as 0.
    On a CPU `torch.set_float32_matmul_precision` counts for products of factors of rank 96 and more.

    Args:
        weight: [N, K], float64, float32, bfloat16 or float16.
        lora_A: [r, K]; lora_B: [N, r]: both of one float dtype, no wider than float32 or weight's.
        scaling: the factor s.
        weight_norm_squared: [N] float32 (float64 for float64), the squared norms of weight's rows where they are known;
            else weight is read once more.

    Returns [N] in float32 (float64 for a float64 weight), without a gradient. Raises ValueError or TypeError naming the
    argument that does not fit.
    """
    op = "dora_norm"
    checks.floating(op, "weight", weight)
    checks.need_value(weight.dim() == 2 and weight.numel() > 0, op, "weight", weight, "of shape [N, K] with N, K >= 1")
    checks.adapters(op, lora_A, lora_B, weight, other="weight")
    checks.shape(op, "lora_B", lora_B, (weight.shape[0], lora_A.shape[0]), "[N, r]")
    checks.number(op, "scaling", scaling)
    dtype = reference.accumulation(weight.dtype)
    if weight_norm_squared is not None:
        checks.vector(op, "weight_norm_squared", weight_norm_squared, len(weight), "N", weight, other="weight")
        weight_norm_squared = weight_norm_squared.to(dtype).contiguous()
    if dtype == torch.float64:
        lora_A, lora_B = lora_A.double(), lora_B.double()
    if dispatch.composed():
        tensors = weight, lora_A, lora_B, weight_norm_squared
        weight, lora_A, lora_B, squares = (None if t is None else t.detach() for t in tensors)  # in forward mode, too
        return reference.norm_of_sum(weight, lora_A, lora_B, float(scaling), squares)
    norm = weight.new_empty(len(weight), dtype=dtype)
    factors = lora_A.contiguous(), lora_B.contiguous()
    dispatch.run("dora_norm", as_rows(weight), *factors, float(scaling), weight_norm_squared, norm)
    return norm


def dora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    weight_norm_squared: Tensor | None = None,
) -> Tensor:
    """y = magnitude / norm * (x weight^T + scaling * drop(x) lora_A^T lora_B^T) + bias, where norm is `dora_norm` of
    the weights  (Liu et al. 2024, equation 5) and a constant in the backward pass (section 4.3).

    Args:
        x, weight, bias, lora_A, lora_B, scaling: as in `lora_linear`.
        magnitude: [N], the learned norms; any float dtype no wider than float32 or x's.
        dropout_p: as in `lora_linear`: x weight^T sees the whole of x, the low-rank branch what is kept of it. PEFT
            drops x for x weight^T too while it trains and adds the plain layer's output in exchange.
        weight_norm_squared: as in `dora_norm`: the squared norms of weight's rows, cached.

    Returns y [..., N] in x's dtype. Gradients reach x, lora_A, lora_B, magnitude and, where they require it, weight and
    bias. Kept for the backward pass: x, drop(x) lora_A^T [M, r], the output without scale and bias in x's dtype where
    magnitude trains, two vectors [N] and the seed. Under autocast x, weight and bias are cast first, but the norm is
    that of the weight as it is given. Raises ValueError or TypeError naming the argument that does not fit.
    """
    if (
        type(scaling) is type(dropout_p) is float
        and dropout_p == 0.0
        and weight_norm_squared is None
        and (mode := native_calls.mode(x, weight, bias, lora_A, lora_B, magnitude))
    ):
        if mode == "training":
            with suppress(native_calls.Declined):
                return _DoRA.apply(x, weight, bias, lora_A, lora_B, magnitude, None, scaling, 0.0, None)
        elif (y := native_calls.dora_call(x, weight, bias, lora_A, lora_B, magnitude, scaling, False)[0]) is not None:
            return y
    checks.floating("dora_linear", "x", x)
    arguments = lora_A, lora_B, magnitude, scaling, dropout_p, weight_norm_squared
    if autocasting(x):
        with autocast_off(x):
            return _linear(weight, *cast_for_autocast(x, weight, bias), *arguments)
    return _linear(weight, x, weight, bias, *arguments)


def _linear(normed, x, weight, bias, lora_A, lora_B, magnitude, scaling, dropout_p, weight_norm_squared):
    op = "dora_linear"
    checks.linear(op, x, weight, bias)
    checks.adapters(op, lora_A, lora_B, x)
    checks.shape(op, "lora_B", lora_B, (weight.shape[0], lora_A.shape[0]), "[N, r]")
    checks.vector(op, "magnitude", magnitude, weight.shape[0], "N", x)
    checks.number(op, "scaling", scaling)
    checks.dropout(op, dropout_p)
    if weight_norm_squared is not None:
        checks.vector(op, "weight_norm_squared", weight_norm_squared, weight.shape[0], "N", x)
    norm = dora_norm(normed, lora_A, lora_B, scaling, weight_norm_squared).to(reference.accumulation(x.dtype))
    if dispatch.composed():
        options = magnitude / norm, scaling, dropout_p, dropout_seed(x, dropout_p)
        return reference.dora(x, weight, bias, lora_A, lora_B, *options)[0]
    if x.dtype == torch.float64:
        lora_A, lora_B = lora_A.double(), lora_B.double()
    bias = None if bias is None else bias.contiguous()
    arguments = x, weight, bias, lora_A.contiguous(), lora_B.contiguous()
    scaling, dropout_p = float(scaling), float(dropout_p)
    sampled = norm, scaling, dropout_p, True
    if dropout_p and x.numel() and not dispatch.has_kernel("dora_forward", (*arguments, *sampled)):
        scale = magnitude / norm  # meets B, so that nothing of low rank is rounded to x's dtype
        y = F.linear(x, weight) * scale
        y = (y if bias is None else y + bias).to(x.dtype)
        scaled_B = (lora_B * scale[:, None]).to(lora_B.dtype)
        return lora_delta_(y, masked(x, dropout_p), lora_A, scaled_B, scaling / (1 - dropout_p))
    options = scaling, dropout_p, dropout_seed(x, dropout_p)
    if needs_gradient(x, weight, bias, lora_A, lora_B, magnitude):
        return _DoRA.apply(*arguments, magnitude, norm, *options)
    return _forward(*arguments, magnitude / norm, *options, False)[0]
