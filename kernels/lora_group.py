"""LoRA on layers of one input, which is read once for all low-rank branches. Equations: README.md."""

import torch

from .blocks import accumulation, launcher
from .lora import dropout_scale, expand_backward, factor_gradient, linear, shrink


@launcher
def lora_group_forward(x, weights, biases, lora_A, lora_Bs, scalings, dropout_p, seed, ys, s):
    """s = drop(x) lora_A^T;  y_i = x weight_i^T + bias_i + scaling_i * s_i lora_B_i^T for every layer i.

    x [M, K], weight_i [N_i, K] of any strides, lora_A [R, K], lora_B_i [N_i, r_i]; written: y_i [M, N_i], s [M, R], of
    which s_i are the next r_i columns.
    """
    shrink(x, lora_A, s, dropout_scale(dropout_p, seed), dropout_p, seed)
    for weight, bias, lora_B, scaling, y, own_s in zip(weights, biases, lora_Bs, scalings, ys, _columns(s, lora_Bs)):
        linear(x, weight, bias, own_s, lora_B, y, scaling)


@launcher
def lora_group_backward(dys, x, weights, lora_A, lora_Bs, scalings, dropout_p, seed, s, dx, dlora_A, dlora_Bs):
    """ds_i = scaling_i * dy_i lora_B_i;  dlora_B_i = scaling_i * dy_i^T s_i;  dlora_A = ds^T drop(x);
    dx = sum over i of dy_i weight_i + drop'(ds lora_A).

    dy_i [M, N_i], the rest as in lora_group_forward; written, unless None or empty: dx [M, K], dlora_A [R, K],
    dlora_B_i [N_i, r_i].
    """
    drop_scale, none = dropout_scale(dropout_p, seed), [None] * len(dys)
    own_ds = none
    if dx is not None or dlora_A is not None:
        own_ds = [dys[0].new_empty(len(dys[0]), b.shape[1], dtype=accumulation(dys[0].dtype)) for b in lora_Bs]
    for dy, own_s, lora_B, scaling, part_of_ds, dlora_B in zip(
        dys, none if s is None else _columns(s, lora_Bs), lora_Bs, scalings, own_ds, dlora_Bs or none
    ):
        expand_backward(dy, own_s, lora_B, scaling, part_of_ds, dlora_B)
    if own_ds is none:
        return
    ds = torch.cat(own_ds, 1)
    if dlora_A is not None:
        factor_gradient(x, ds, dlora_A, 0, drop_scale, dropout_p, seed)
    if dx is not None:
        linear(dys[0], weights[0].T, None, ds, lora_A.T, dx, drop_scale, dropout_p, seed)
        for dy, weight in zip(dys[1:], weights[1:]):
            dx.addmm_(dy, weight)


def _columns(s, lora_Bs):
    return s.split([lora_B.shape[1] for lora_B in lora_Bs], 1)
