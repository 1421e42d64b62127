"""Low-rank branches by torch's own products in the dtype of the operands: what serves a GPU that has not run our
kernels yet, and what they are measured against. Shapes and meaning are those of reference.py, which sums in float32."""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from .reference import dora_norm, group_tokens  # noqa: F401 - a norm is exact, and torch has a sort

GATHERED = 2**27  # elements of adapters that are copied for one product; beyond, adapters come one after the other


def lora_forward(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed, y, s) -> None:
    """s = drop(x) lora_A^T;  y = x weight^T + bias + scaling * s lora_B^T.

    Without weight, y += scaling * s lora_B^T.
    """
    shrunk = _shrunk(x, lora_A, dropout_p, seed, s)
    if weight is not None:
        reference.linear(x, weight, bias, y)
    _add(y, shrunk, lora_B.to(shrunk.dtype).T, scaling)


def _shrunk(x: Tensor, lora_A: Tensor, p: float, seed: Tensor | None, s: Tensor) -> Tensor:
    """drop(x) lora_A^T in the dtype of the operands; s is written."""
    dtype = torch.promote_types(x.dtype, lora_A.dtype)
    shrunk = _dropped(x.to(dtype), p, seed) @ lora_A.to(dtype).T
    s.copy_(shrunk)
    return shrunk


def lora_backward(dy, x, weight, lora_A, lora_B, scaling, dropout_p, seed, s, dx, dlora_A, dlora_B) -> None:
    """ds = scaling * dy lora_B;  dlora_B = scaling * dy^T s;  dlora_A = ds^T drop(x);
    dx = dy weight + drop'(ds lora_A), without weight the second term alone. What is None is not formed."""
    dtype = torch.promote_types(dy.dtype, lora_A.dtype)
    gradient = dy.to(dtype)
    ds = (gradient @ lora_B.to(dtype)).mul_(scaling)
    if dlora_B is not None:
        dlora_B.copy_((gradient.T @ s.to(dtype)) * scaling)
    if dlora_A is not None:
        dlora_A.copy_(ds.T @ _dropped(x.to(dtype), dropout_p, seed))
    if dx is not None:
        dx.zero_() if weight is None else torch.mm(dy, weight, out=dx)
        _add_dropped(dx, ds, lora_A.to(dtype), dropout_p, seed)


def lora_group_forward(x, weights, biases, lora_A, lora_Bs, scalings, dropout_p, seed, ys, s) -> None:
    """s = drop(x) lora_A^T;  y_i = x weight_i^T + bias_i + scaling_i * s_i lora_B_i^T for every layer i."""
    shrunk = _shrunk(x, lora_A, dropout_p, seed, s)
    columns = reference.columns(shrunk, lora_Bs)
    for y, weight, bias, own, lora_B, scaling in zip(ys, weights, biases, columns, lora_Bs, scalings):
        reference.linear(x, weight, bias, y)
        _add(y, own, lora_B.to(own.dtype).T, scaling)


def lora_group_backward(dys, x, weights, lora_A, lora_Bs, scalings, dropout_p, seed, s, dx, dlora_A, dlora_Bs) -> None:
    """ds_i = scaling_i * dy_i lora_B_i;  dlora_B_i = scaling_i * dy_i^T s_i;  dlora_A = ds^T drop(x);
    dx = sum over i of dy_i weight_i + drop'(ds lora_A). What is None or an empty list is not formed."""
    dtype = torch.promote_types(dys[0].dtype, lora_A.dtype)
    gradients = [dy.to(dtype) for dy in dys]
    if dlora_Bs:
        for dlora_B, gradient, own, scaling in zip(dlora_Bs, gradients, reference.columns(s, lora_Bs), scalings):
            dlora_B.copy_((gradient.T @ own.to(dtype)) * scaling)
    if dx is None and dlora_A is None:
        return
    parts = zip(gradients, lora_Bs, scalings)
    ds = torch.cat([(gradient @ lora_B.to(dtype)).mul_(scaling) for gradient, lora_B, scaling in parts], 1)
    if dlora_A is not None:
        dlora_A.copy_(ds.T @ _dropped(x.to(dtype), dropout_p, seed))
    if dx is not None:
        torch.mm(dys[0], weights[0], out=dx)
        for dy, weight in zip(dys[1:], weights[1:]):
            torch.addmm(dx, dy, weight, out=dx)
        _add_dropped(dx, ds, lora_A.to(dtype), dropout_p, seed)


def _dropped(t: Tensor, p: float, seed: Tensor | None) -> Tensor:
    return t if seed is None else t * reference.dropout_factor(seed, p, *t.shape, t.dtype)


def _add(y: Tensor, left: Tensor, right: Tensor, scaling: float) -> None:
    """y += scaling * left right, in one product where the dtypes are one."""
    if y.dtype == left.dtype:
        torch.addmm(y, left, right, alpha=scaling, out=y)  # FlopCounterMode does not count addmm_
    else:
        y.add_(left @ right, alpha=scaling)


def _add_dropped(dx: Tensor, ds: Tensor, lora_A: Tensor, p: float, seed: Tensor | None) -> None:
    """dx += drop'(ds lora_A)."""
    if seed is None:
        _add(dx, ds, lora_A, 1.0)
    else:
        dx.add_(_dropped(ds @ lora_A, p, seed))


def dora_forward(x, weight, bias, lora_A, lora_B, scale, scaling, dropout_p, seed, y, s, unscaled) -> None:
    """s = drop(x) lora_A^T;  unscaled = x weight^T + scaling * s lora_B^T;  y = scale * unscaled + bias."""
    product = y if unscaled is None else unscaled
    lora_forward(x, weight, None, lora_A, lora_B, scaling, dropout_p, seed, product, s)
    torch.mul(product, scale, out=y) if bias is None else torch.addcmul(bias, product, scale, out=y)


def dora_backward(
    dy, x, weight, lora_A, lora_B, scale, scaling, dropout_p, seed, s, unscaled, dx, dlora_A, dlora_B, dscale
) -> None:
    """du = dy * scale;  dscale = sum over rows of dy * unscaled;  dx, dlora_A and dlora_B are those of LoRA for du in
    place of dy. What is None is not formed.

    In the branch the scale meets B and dB, so that it is not rounded to dy's dtype on the way.
    """
    if dscale is not None:
        torch.sum(dy.to(scale.dtype) * unscaled, 0, out=dscale)
    lora_backward(dy, x, None, lora_A, lora_B * scale[:, None], scaling, dropout_p, seed, s, dx, dlora_A, dlora_B)
    if dlora_B is not None:
        dlora_B.mul_(scale[:, None])
    if dx is not None:
        torch.addmm(dx, torch.mul(dy, scale, out=torch.empty_like(dy)), weight, out=dx)


def bottleneck_forward(x, residual, down, down_bias, up, up_bias, scaling, activation, y, s) -> None:
    """s = x down^T;  y = residual + scaling * phi(s + down_bias) up^T + up_bias."""
    dtype = torch.promote_types(x.dtype, down.dtype)
    middle = F.linear(x.to(dtype), down.to(dtype), None if down_bias is None else down_bias.to(dtype))
    s.copy_(middle)
    if down_bias is not None:
        s.sub_(down_bias)
    y.copy_(residual)
    _add(y, reference.ACTIVATIONS[activation](middle), up.to(dtype).T, scaling)
    if up_bias is not None:
        y.add_(up_bias)


def bottleneck_backward(dy, x, down, down_bias, up, scaling, activation, s, serial, dx, ddown, ddown_bias, dup) -> None:
    """dup = scaling * dy^T phi(s + down_bias);  ds = scaling * dy up * phi'(s + down_bias);  ddown = ds^T x;
    ddown_bias = sum over rows of ds;  dx = ds down, + dy where serial (residual is x). What is None is not formed."""
    dtype = torch.promote_types(dy.dtype, down.dtype)
    gradient, middle = dy.to(dtype), s if down_bias is None else s + down_bias
    if dup is not None:
        dup.copy_(gradient.T @ (reference.ACTIVATIONS[activation](middle) * scaling).to(dtype))
    ds = (gradient @ up.to(dtype)) * reference.slope(middle, activation) * scaling
    if ddown_bias is not None:
        ddown_bias.copy_(ds.sum(0))
    ds = ds.to(dtype)
    if ddown is not None:
        ddown.copy_(ds.T @ x.to(dtype))
    if dx is not None:
        dx.copy_(dy) if serial else dx.zero_()
        _add(dx, ds, down.to(dtype), 1.0)


def multi_lora_forward(x, weight, bias, lora_A, lora_B, scaling, ranks, order, segments, y, s) -> None:
    """y = x weight^T + bias;  for every adapter a, on its tokens t:  s[t] = x[t] lora_A[a]^T;
    y[t] += scaling[a] * s[t] lora_B[a]^T.  Without weight, the latter alone.

    Every token's adapter is gathered, so that nothing has to be known on the host, while that stays small.
    """
    (tokens, _), (num_adapters, rank, _) = x.shape, lora_A.shape
    if tokens * rank * (x.shape[1] + y.shape[1]) > GATHERED:
        return reference.multi_lora_forward(x, weight, bias, lora_A, lora_B, scaling, ranks, order, segments, y, s)
    if weight is not None:
        reference.linear(x, weight, bias, y)
    positions = torch.arange(tokens, device=x.device)
    adapter = torch.searchsorted(segments, positions, right=True) - 1
    served = ((adapter >= 0) & (adapter < num_adapters))[:, None]
    adapter = adapter.clamp(0, num_adapters - 1)
    used = served if ranks is None else served & (torch.arange(rank, device=x.device) < ranks[adapter][:, None])
    dtype = torch.promote_types(x.dtype, lora_A.dtype)
    down = torch.where(used[:, :, None], lora_A[adapter].to(dtype), 0.0)  # or torch's bmm mixes rows, and NaN in them
    shrunk = torch.where(used, torch.bmm(down, x[order].to(dtype)[:, :, None])[:, :, 0], 0.0)
    s[order] = shrunk.to(s.dtype)
    factor = torch.where(used[:, None, :], lora_B[adapter].to(dtype), 0.0)
    delta = torch.bmm(factor, shrunk[:, :, None])[:, :, 0] * scaling[adapter][:, None]
    y[order] = torch.where(served, y[order] + delta, y[order]).to(y.dtype)
