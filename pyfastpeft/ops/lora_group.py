"""LoRA on linear layers of one input, which is read once for all low-rank branches (Hu et al. 2021, equation 3)."""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from . import checks, dispatch, reference
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


def _forward(x, weights, biases, lora_As, lora_Bs, scalings, dropout_p, seed):
    """(ys, s, backend)."""
    rows, lora_A, backend = as_rows(x), torch.cat(lora_As), None
    ys = [rows.new_empty(*x.shape[:-1], len(weight)) for weight in weights]
    s = rows.new_empty(rows.shape[0], len(lora_A), dtype=reference.accumulation(x.dtype))
    if rows.numel():
        outs = [y.view(-1, y.shape[-1]) for y in ys]
        arguments = rows, weights, biases, lora_A, lora_Bs, scalings, dropout_p, seed, outs, s
        backend = dispatch.run("lora_group_forward", *arguments)
    return ys, s, backend


def _by_kind(members):
    """Lists of weights, biases, lora_As and lora_Bs, or of what belongs to each, which stand one after the other."""
    count = len(members) // 4
    return [list(members[i * count : (i + 1) * count]) for i in range(4)]


class _LoRAGroup(Function):
    @staticmethod
    def forward(ctx, x, seed, scalings, dropout_p, *members):
        weights, biases, lora_As, lora_Bs = _by_kind(members)
        ys, s, backend = _forward(x, weights, biases, lora_As, lora_Bs, scalings, dropout_p, seed)
        need_weights, _, need_As, need_Bs = map(any, _by_kind(ctx.needs_input_grad[4:]))
        kept = x if need_As or need_weights else None, s if need_Bs else None
        ctx.save_for_backward(*kept, seed, *weights, *lora_As, *lora_Bs)
        ctx.options = backend, scalings, dropout_p, x.shape
        return tuple(ys)

    @staticmethod
    @first_order
    @without_autocast
    def backward(ctx, *dys):
        x, s, seed, *members = ctx.saved_tensors
        backend, scalings, dropout_p, shape = ctx.options
        count = len(dys)
        weights, lora_As, lora_Bs = (list(members[i * count : (i + 1) * count]) for i in range(3))
        need_x = ctx.needs_input_grad[0]
        need_weights, need_biases, need_As, need_Bs = _by_kind(ctx.needs_input_grad[4:])
        dy_rows = [as_rows(dy) for dy in dys]
        x_rows = None if x is None else as_rows(x)
        lora_A = torch.cat(lora_As)
        dx = dy_rows[0].new_empty(dy_rows[0].shape[0], shape[-1]) if need_x else None
        dlora_A = torch.empty_like(lora_A) if any(need_As) else None
        dlora_Bs = [torch.empty_like(lora_B) for lora_B in lora_Bs] if any(need_Bs) else []
        if dys[0].numel() == 0:
            zero(dlora_A, *dlora_Bs)
        elif need_x or dlora_A is not None or dlora_Bs:
            arguments = dy_rows, x_rows, weights, lora_A, lora_Bs, scalings, dropout_p, seed, s, dx, dlora_A, dlora_Bs
            dispatch.run("lora_group_backward", *arguments, backend=backend)
        dlora_As = [None] * count if dlora_A is None else dlora_A.split([len(lora_A) for lora_A in lora_As])
        gradients = (
            *(dy.T @ x_rows if need else None for dy, need in zip(dy_rows, need_weights)),
            *(dy.sum(0) if need else None for dy, need in zip(dy_rows, need_biases)),
            *(gradient if need else None for gradient, need in zip(dlora_As, need_As)),
            *(gradient if need else None for gradient, need in zip(dlora_Bs or [None] * count, need_Bs)),
        )
        return shaped(dx, shape), None, None, None, *gradients


def lora_linear_group(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    scalings: Sequence[float],
    dropout_p: float = 0.0,
) -> tuple[Tensor, ...]:
    """y_i = x weights_i^T + biases_i + scalings_i * drop(x) lora_As_i^T lora_Bs_i^T  (Hu et al. 2021, equation 3) for
    every layer i of those that share x, such as query, key and value: `lora_linear` of each, but x is read once for
    all lora_As, and the gradient of x is formed once.

    Args:
        x: [..., K], float64, float32, bfloat16 or float16, any strides.
        weights: of every layer [N_i, K], of x's dtype; any strides.
        biases: of every layer [N_i], of x's dtype, or None.
        lora_As: of every layer [r_i, K]; lora_Bs: [N_i, r_i]: all of one float dtype, which may differ from x's.
        scalings: of every layer the factor s_i.
        dropout_p: as in `lora_linear`. All layers see one mask, where PEFT draws one for each: every layer's output is
            distributed as before, but what they drop is no longer independent of each other.

    Returns a tuple of y_i [..., N_i] in x's dtype. Gradients reach x, lora_As, lora_Bs and, where they require it,
    weights and biases. Kept for the backward pass: x, drop(x) lora_As^T [M, sum of r_i] and the seed. Under autocast x,
    weights and biases are cast first. Raises ValueError or TypeError naming the argument that does not fit.
    """
    op = "lora_linear_group"
    checks.floating(op, "x", x)
    members = {"weights": weights, "biases": biases, "lora_As": lora_As, "lora_Bs": lora_Bs, "scalings": scalings}
    for name, values in members.items():
        checks.entries(op, name, values, weights, "weights")
    if autocasting(x):
        x, *cast = cast_for_autocast(x, *weights, *biases)
        weights, biases = cast[: len(weights)], cast[len(weights) :]
        with autocast_off(x):
            return lora_linear_group(x, weights, biases, lora_As, lora_Bs, scalings, dropout_p)
    for i, (weight, bias, lora_A, lora_B, scaling) in enumerate(zip(*members.values())):
        names = f"lora_As[{i}]", f"lora_Bs[{i}]"
        checks.linear(op, x, weight, bias, (f"weights[{i}]", f"biases[{i}]"), fits_others=i > 0)
        checks.adapters(op, lora_A, lora_B, x, called=names)
        checks.shape(op, names[1], lora_B, (len(weight), len(lora_A)), "[N, r]")
        checks.like(op, names[0], lora_A, lora_As[0], other="lora_As[0]")
        checks.number(op, f"scalings[{i}]", scaling)
    checks.dropout(op, dropout_p)
    if x.dtype == torch.float64:
        lora_As, lora_Bs = [lora_A.double() for lora_A in lora_As], [lora_B.double() for lora_B in lora_Bs]
    biases = [None if bias is None else bias.contiguous() for bias in biases]
    lora_Bs = [lora_B.contiguous() for lora_B in lora_Bs]
    scalings, dropout_p = [float(scaling) for scaling in scalings], float(dropout_p)
    if dispatch.composed():
        seed, bases = dropout_seed(x, dropout_p), map(partial(F.linear, x), weights, biases)
        members = zip(bases, lora_As, lora_Bs, scalings)
        return tuple(reference.lora(x, *member, dropout_p, seed)[0] for member in members)
    layers = weights, biases, lora_As[0], lora_Bs, scalings
    if dropout_p and x.numel() and not dispatch.has_kernel("lora_group_forward", (x, *layers, dropout_p, True)):
        rows = as_rows(x)  # whose products are no views, into which no Function may write
        bases, kept = map(partial(F.linear, rows), weights, biases), masked(rows, dropout_p)
        adapters = zip(lora_As, lora_Bs, [scaling / (1 - dropout_p) for scaling in scalings])
        outs = [lora_delta_(base, kept, *adapter) for base, adapter in zip(bases, adapters)]
        return tuple(shaped(out, (*x.shape[:-1], out.shape[1])) for out in outs)
    seed = dropout_seed(x, dropout_p)
    if needs_gradient(x, *weights, *biases, *lora_As, *lora_Bs):
        return _LoRAGroup.apply(x, seed, scalings, dropout_p, *weights, *biases, *lora_As, *lora_Bs)
    ys, *_ = _forward(x, list(weights), biases, lora_As, lora_Bs, scalings, dropout_p, seed)
    return tuple(ys)
