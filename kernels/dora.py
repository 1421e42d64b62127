"""DoRA on a linear layer: LoRA with every output feature scaled to a learned magnitude (Liu et al. 2024, eq. 5)."""

import torch

from .blocks import launcher
from .ia3 import column_sums
from .lora import dropout_scale, expand_backward, factor_gradient, linear, shrink


@launcher
def dora_norm(weight, lora_A, lora_B, scaling, weight_norm_squared, norm):
    """norm = sqrt(||weight||^2 + 2 scaling <weight lora_A^T, lora_B> + scaling^2 <lora_B lora_A lora_A^T, lora_B>), by
    rows: of weight [N, K], lora_A [r, K], lora_B [N, r], weight_norm_squared [N] or None; written: norm [N].
    """
    rank = len(lora_A)
    cross, gram, own = (norm.new_empty(rows, rank) for rows in (len(norm), rank, len(norm)))
    shrink(weight, lora_A, cross, 2 * scaling)
    shrink(lora_A, lora_A, gram, scaling**2)
    shrink(lora_B, gram, own, 1.0)
    if weight_norm_squared is None:
        weight_norm_squared = torch.linalg.vector_norm(weight, dim=1, dtype=norm.dtype).square_()
    total = cross.add_(own).mul_(lora_B).sum(1).add_(weight_norm_squared)
    torch.sqrt(total.clamp_min_(0), out=norm)


@launcher
def dora_forward(x, weight, bias, lora_A, lora_B, scale, scaling, dropout_p, seed, y, s, unscaled):
    """s = drop(x) lora_A^T;  unscaled = x weight^T + scaling * s lora_B^T;  y = scale * unscaled + bias.

    x [M, K], weight [N, K] of any strides, lora_A [r, K], lora_B [N, r], scale [N]; written: y [M, N], s [M, r] and,
    unless None, unscaled [M, N].
    """
    shrink(x, lora_A, s, dropout_scale(dropout_p, seed), dropout_p, seed)
    linear(x, weight, bias, s, lora_B, y, scaling, scale=scale, unscaled=unscaled)


@launcher
def dora_backward(
    dy, x, weight, lora_A, lora_B, scale, scaling, dropout_p, seed, s, unscaled, dx, dlora_A, dlora_B, dscale
):
    """du = dy * scale;  dscale = sum over rows of dy * unscaled;  dx, dlora_A and dlora_B are those of LoRA for du.

    dy [M, N], the rest as in dora_forward; written, each unless None: dx [M, K], dlora_A, dlora_B, dscale [N]. What is
    low-rank meets the scale in lora_B and dlora_B, so that it is not rounded to dy's dtype on the way.
    """
    drop_scale, du, ds = dropout_scale(dropout_p, seed), None, None
    if dx is not None:
        du = dy.new_empty(dy.shape)
    if dx is not None or dlora_A is not None:
        ds = dy.new_empty(len(dy), len(lora_A), dtype=scale.dtype)
    if du is not None or dscale is not None:
        column_sums(dy, unscaled, dscale, None if du is None else scale, du)
    expand_backward(dy, s, (scale[:, None] * lora_B).to(lora_B.dtype), scaling, ds, dlora_B)
    if dlora_B is not None:
        dlora_B.mul_(scale[:, None])
    if dlora_A is not None:
        factor_gradient(x, ds, dlora_A, 0, drop_scale, dropout_p, seed)
    if dx is not None:
        linear(du, weight.T, None, ds, lora_A.T, dx, drop_scale, dropout_p, seed)
