"""Every formula in plain PyTorch, forward and backward: the specification, and the fallback on every device.

Shapes: x [M, K], weight [N, K], bias [N], lora_A [r, K], lora_B [N, r], y and dy [M, N], s [M, r].
Functions by the names of raw ops, as lora_forward, write into their last arguments, as the kernels do; those that
return what they compute, as lora, can be differentiated any number of times and transformed by torch.func. Products
of adapters are formed in `accumulation(x.dtype)` and rounded once.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor


def accumulation(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which products are summed: float64 for float64, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """y = x weight^T + bias."""
    torch.mm(x, weight.T, out=y) if bias is None else torch.addmm(bias, x, weight.T, out=y)


def _write(results, *targets) -> None:
    for result, target in zip(results, targets):
        target.copy_(result)


# --- dropout ---------------------------------------------------------------------------------------------------------

PHILOX_M = (0xD2511F53, 0xCD9E8D57)
PHILOX_W = (0x9E3779B9, 0xBB67AE85)
MASK32 = 0xFFFFFFFF


def philox(seed: Tensor, c0: Tensor, c1: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 (Salmon et al. 2011) of the counter (c0, c1, 0, 0) under the 64-bit key `seed` [1] int64.

    Words are held in int64 tensors; the four results have the broadcast shape of c0 and c1.
    """
    c0, c1 = torch.broadcast_tensors(c0, c1)
    c2 = c3 = torch.zeros_like(c0)
    k0, k1 = seed & MASK32, (seed >> 32) & MASK32
    for _ in range(10):
        p0, p1 = c0 * PHILOX_M[0], c2 * PHILOX_M[1]
        c0, c1, c2, c3 = (p1 >> 32) & MASK32 ^ c1 ^ k0, p1 & MASK32, (p0 >> 32) & MASK32 ^ c3 ^ k1, p0 & MASK32
        k0, k1 = (k0 + PHILOX_W[0]) & MASK32, (k1 + PHILOX_W[1]) & MASK32
    return c0, c1, c2, c3


def dropout_factor(seed: Tensor, p: float, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """[rows, columns]: 1 / (1 - p) where an element is kept, else 0.

    Element (m, k) is kept iff word k mod 4 of philox(seed; k // 4, m) is at least floor(p * 2**32).
    """
    row = torch.arange(rows, device=seed.device)[:, None]
    quad = torch.arange((columns + 3) // 4, device=seed.device)[None, :]
    bits = torch.stack(philox(seed, quad, row), dim=-1).flatten(1)[:, :columns]
    return (bits >= int(p * 2**32)).to(dtype) / (1 - p)


def _dropped(x: Tensor, p: float, seed: Tensor | None) -> Tensor:
    wide = x.to(accumulation(x.dtype))
    if seed is None:
        return wide
    return wide * dropout_factor(seed, p, math.prod(x.shape[:-1]), x.shape[-1], wide.dtype).view(x.shape)


# --- LoRA ------------------------------------------------------------------------------------------------------------


def lora(x, base, lora_A, lora_B, scaling, dropout_p, seed) -> tuple[Tensor, Tensor]:
    """(y, s): s = drop(x) lora_A^T;  y = base + scaling * s lora_B^T."""
    s = _shrunk(x, lora_A, dropout_p, seed)
    return _expanded(base, s, lora_B, scaling), s


def _shrunk(x, lora_A, dropout_p, seed):
    wide = _dropped(x, dropout_p, seed)
    return wide @ lora_A.to(wide.dtype).T


def _expanded(base, s, lora_B, scaling):
    return (base.to(s.dtype) + scaling * (s @ lora_B.to(s.dtype).T)).to(base.dtype)


def lora_forward(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed, y, s) -> None:
    """s = drop(x) lora_A^T;  y = x weight^T + bias + scaling * s lora_B^T.

    Without weight, y += scaling * s lora_B^T.
    """
    base = y if weight is None else F.linear(x, weight, bias)
    _write(lora(x, base, lora_A, lora_B, scaling, dropout_p, seed), y, s)


def lora_backward(dy, x, weight, lora_A, lora_B, scaling, dropout_p, seed, s, dx, dlora_A, dlora_B) -> None:
    """ds = scaling * dy lora_B;  dlora_B = scaling * dy^T s;  dlora_A = ds^T drop(x);
    dx = dy weight + drop'(ds lora_A), without weight the second term alone. What is None is not formed."""
    wide = dy.to(accumulation(dy.dtype))
    ds = scaling * (wide @ lora_B.to(wide.dtype))
    if dlora_B is not None:
        dlora_B.copy_(scaling * (wide.T @ s))
    if dlora_A is not None:
        dlora_A.copy_(ds.T @ _dropped(x, dropout_p, seed))
    if dx is not None:
        branch = _dropped(ds @ lora_A.to(wide.dtype), dropout_p, seed)
        dx.copy_(branch if weight is None else branch + dy @ weight)


# --- LoRA on layers of one input -------------------------------------------------------------------------------------


def lora_group_forward(x, weights, biases, lora_A, lora_Bs, scalings, dropout_p, seed, ys, s) -> None:
    """s = drop(x) lora_A^T;  y_i = x weight_i^T + bias_i + scaling_i * s_i lora_B_i^T for every layer i.

    lora_A [R, K] is that of all layers, one below the other, and s_i [M, r_i] their columns of s [M, R].
    """
    s.copy_(_shrunk(x, lora_A, dropout_p, seed))
    for y, weight, bias, own_s, lora_B, scaling in zip(ys, weights, biases, columns(s, lora_Bs), lora_Bs, scalings):
        y.copy_(_expanded(F.linear(x, weight, bias), own_s, lora_B, scaling))


def lora_group_backward(dys, x, weights, lora_A, lora_Bs, scalings, dropout_p, seed, s, dx, dlora_A, dlora_Bs) -> None:
    """ds_i = scaling_i * dy_i lora_B_i;  dlora_B_i = scaling_i * dy_i^T s_i;  dlora_A = ds^T drop(x);
    dx = sum over i of dy_i weight_i + drop'(ds lora_A). What is None or an empty list is not formed."""
    wide = [dy.to(accumulation(dy.dtype)) for dy in dys]
    ds = torch.cat([scaling * (dy @ lora_B.to(dy.dtype)) for dy, lora_B, scaling in zip(wide, lora_Bs, scalings)], 1)
    if dlora_Bs:
        for dlora_B, dy, own_s, scaling in zip(dlora_Bs, wide, columns(s, lora_Bs), scalings):
            dlora_B.copy_(scaling * (dy.T @ own_s))
    if dlora_A is not None:
        dlora_A.copy_(ds.T @ _dropped(x, dropout_p, seed))
    if dx is not None:
        products = (dy @ weight for dy, weight in zip(dys, weights))
        dx.copy_(sum(products, start=_dropped(ds @ lora_A.to(ds.dtype), dropout_p, seed)))


def columns(s: Tensor, lora_Bs: list[Tensor]) -> tuple[Tensor, ...]:
    """The columns of s [M, R] that belong to each of lora_Bs [N_i, r_i]."""
    return s.split([lora_B.shape[1] for lora_B in lora_Bs], 1)


# --- DoRA ------------------------------------------------------------------------------------------------------------


def norm_of_sum(weight, lora_A, lora_B, scaling, weight_norm_squared) -> Tensor:
    """||weight + scaling * lora_B lora_A|| of every row [N], as the root of
    ||weight||^2 + 2 scaling <weight lora_A^T, lora_B> + scaling^2 <lora_B (lora_A lora_A^T), lora_B>."""
    wide, factor_A, factor_B = (t.to(accumulation(weight.dtype)) for t in (weight, lora_A, lora_B))
    squares = torch.linalg.vector_norm(wide, dim=1) ** 2 if weight_norm_squared is None else weight_norm_squared
    inner = 2 * scaling * (wide @ factor_A.T) + scaling**2 * (factor_B @ (factor_A @ factor_A.T))
    return (squares + (inner * factor_B).sum(1)).clamp_min(0).sqrt()


def dora_norm(weight, lora_A, lora_B, scaling, weight_norm_squared, norm) -> None:
    """norm [N] = ||weight + scaling * lora_B lora_A|| of every row."""
    norm.copy_(norm_of_sum(weight, lora_A, lora_B, scaling, weight_norm_squared))


def dora(x, weight, bias, lora_A, lora_B, scale, scaling, dropout_p, seed) -> tuple[Tensor, Tensor, Tensor]:
    """(y, s, unscaled): s = drop(x) lora_A^T;  unscaled = x weight^T + scaling * s lora_B^T;
    y = scale * unscaled + bias."""
    s = _shrunk(x, lora_A, dropout_p, seed)
    unscaled = _expanded(F.linear(x, weight).to(s.dtype), s, lora_B, scaling)
    return _shifted(scale * unscaled, bias).to(x.dtype), s, unscaled


def dora_forward(x, weight, bias, lora_A, lora_B, scale, scaling, dropout_p, seed, y, s, unscaled) -> None:
    """s = drop(x) lora_A^T;  unscaled = x weight^T + scaling * s lora_B^T;  y = scale * unscaled + bias.

    scale [N] is of the dtype of sums; `unscaled` [M, N] may be None where no backward pass needs it.
    """
    results = dora(x, weight, bias, lora_A, lora_B, scale, scaling, dropout_p, seed)
    _write(results, y, s, *([] if unscaled is None else [unscaled]))


def dora_backward(
    dy, x, weight, lora_A, lora_B, scale, scaling, dropout_p, seed, s, unscaled, dx, dlora_A, dlora_B, dscale
) -> None:
    """du = dy * scale;  dscale = sum over rows of dy * unscaled;  dx, dlora_A and dlora_B are those of LoRA for du in
    place of dy. What is None is not formed."""
    du = dy.to(scale.dtype) * scale
    if dscale is not None:
        torch.sum(dy.to(scale.dtype) * unscaled, 0, out=dscale)
    ds = scaling * (du @ lora_B.to(du.dtype))
    if dlora_B is not None:
        dlora_B.copy_(scaling * (du.T @ s))
    if dlora_A is not None:
        dlora_A.copy_(ds.T @ _dropped(x, dropout_p, seed))
    if dx is not None:
        dx.copy_(_dropped(ds @ lora_A.to(du.dtype), dropout_p, seed) + du.to(dy.dtype) @ weight)


# --- IA3 -------------------------------------------------------------------------------------------------------------


def ia3(x, weight, bias, ia3_l, feedforward) -> Tensor:
    """(x * ia3_l) weight^T + bias where feedforward, else (x weight^T + bias) * ia3_l."""
    scale = ia3_l.to(accumulation(x.dtype))
    if feedforward:
        return F.linear((x * scale).to(x.dtype), weight, bias)
    return (F.linear(x, weight, bias) * scale).to(x.dtype)


def ia3_forward(x, weight, bias, ia3_l, feedforward, y, base) -> None:
    """feedforward: y = (x * ia3_l) weight^T + bias.  Otherwise: base = x weight^T + bias;  y = base * ia3_l.

    `base` [M, N] may be None where no backward pass needs it.
    """
    scale = ia3_l.to(accumulation(x.dtype))
    if feedforward:
        return linear(torch.mul(x, scale, out=torch.empty_like(x)), weight, bias, y)
    product = y if base is None else base
    linear(x, weight, bias, product)
    torch.mul(product, scale, out=y)


def ia3_backward(dy, x, weight, ia3_l, feedforward, base, dx, dia3_l) -> None:
    """feedforward: g = dy weight;  dx = g * ia3_l;  dia3_l = sum over rows of g * x.
    Otherwise: dia3_l = sum over rows of dy * base;  dx = (dy * ia3_l) weight. What is None is not formed."""
    scale = ia3_l.to(accumulation(dy.dtype))
    if feedforward:
        inner = dy @ weight
        if dx is not None:
            torch.mul(inner, scale, out=dx)
        if dia3_l is not None:
            dia3_l.copy_((inner.to(scale.dtype) * x).sum(0))
        return
    if dia3_l is not None:
        dia3_l.copy_((dy.to(scale.dtype) * base).sum(0))
    if dx is not None:
        torch.mm(torch.mul(dy, scale, out=torch.empty_like(dy)), weight, out=dx)


# --- bottleneck adapters ---------------------------------------------------------------------------------------------

ACTIVATIONS = {
    "relu": torch.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
    "identity": lambda v: v,
}
GELU_TANH = math.sqrt(2 / math.pi), 0.044715


def slope(v: Tensor, activation: str) -> Tensor:
    """The derivative of ACTIVATIONS[activation] at v."""
    if activation == "relu":
        return (v > 0).to(v.dtype)
    if activation == "gelu":
        return torch.special.ndtr(v) + v * torch.exp(-v * v / 2) / math.sqrt(2 * math.pi)
    if activation == "gelu_tanh":
        outer, cubic = GELU_TANH
        share = torch.sigmoid(2 * outer * (v + cubic * v**3))
        return share + v * share * (1 - share) * 2 * outer * (1 + 3 * cubic * v * v)
    if activation == "silu":
        share = torch.sigmoid(v)
        return share + v * share * (1 - share)
    if activation == "tanh":
        return 1 - torch.tanh(v) ** 2
    return torch.ones_like(v)


def _shifted(s: Tensor, bias: Tensor | None) -> Tensor:
    return s if bias is None else s + bias


def bottleneck(x, residual, down, down_bias, up, up_bias, scaling, activation) -> tuple[Tensor, Tensor]:
    """(y, s): s = x down^T;  y = residual + scaling * phi(s + down_bias) up^T + up_bias.  down [r, K], up [N, r]."""
    s = _shrunk(x, down, 0.0, None)
    hidden = ACTIVATIONS[activation](_shifted(s, down_bias))
    y = _shifted(residual + scaling * (hidden @ up.to(s.dtype).T), up_bias)
    return y.to(x.dtype), s


def bottleneck_forward(x, residual, down, down_bias, up, up_bias, scaling, activation, y, s) -> None:
    """s = x down^T;  y = residual + scaling * phi(s + down_bias) up^T + up_bias.  down [r, K], up [N, r]."""
    _write(bottleneck(x, residual, down, down_bias, up, up_bias, scaling, activation), y, s)


def bottleneck_backward(dy, x, down, down_bias, up, scaling, activation, s, serial, dx, ddown, ddown_bias, dup) -> None:
    """dup = scaling * dy^T phi(s + down_bias);  ds = scaling * dy up * phi'(s + down_bias);  ddown = ds^T x;
    ddown_bias = sum over rows of ds;  dx = ds down, + dy where serial (residual is x). What is None is not formed."""
    wide, middle = dy.to(s.dtype), _shifted(s, down_bias)
    ds = scaling * (wide @ up.to(s.dtype)) * slope(middle, activation)
    if dup is not None:
        dup.copy_(scaling * (wide.T @ ACTIVATIONS[activation](middle)))
    if ddown is not None:
        ddown.copy_(ds.T @ x.to(s.dtype))
    if ddown_bias is not None:
        ddown_bias.copy_(ds.sum(0))
    if dx is not None:
        branch = ds @ down.to(s.dtype)
        dx.copy_(branch + dy if serial else branch)


# --- batched multi-LoRA ----------------------------------------------------------------------------------------------


def group_tokens(slots, order, segments) -> None:
    """order [T]: the tokens sorted by slot, stably. segments [L + 1]: adapter a's tokens are
    order[segments[a] : segments[a + 1]]; those of slot -1 stand before, those of L or more after all of these.
    """
    ordered, indices = torch.sort(slots, stable=True)
    order.copy_(indices)
    segments.copy_(torch.searchsorted(ordered, torch.arange(len(segments), device=slots.device, dtype=slots.dtype)))


def _segments(order, segments, ranks, rank):
    """Of every adapter that has tokens, and of the first, so that gradients are zero, not missing, where none has."""
    bounds = segments.tolist()
    true_ranks = [rank] * (len(bounds) - 1) if ranks is None else ranks.tolist()
    for adapter, true_rank in enumerate(true_ranks):
        if adapter == 0 or bounds[adapter] < bounds[adapter + 1]:
            yield adapter, order[bounds[adapter] : bounds[adapter + 1]], true_rank


def multi_lora(x, base, lora_A, lora_B, scaling, ranks, order, segments) -> tuple[Tensor, Tensor]:
    """(y, s): for every adapter a, on its tokens t:  s[t] = x[t] lora_A[a]^T;  y[t] = base[t] + scaling[a] * s[t]
    lora_B[a]^T;  y = base and s = 0 on all others."""
    rank = lora_A.shape[1]
    used = [
        (tokens, *lora(x[tokens], base[tokens], lora_A[a, :r], lora_B[a, :, :r], scaling[a], 0.0, None))
        for a, tokens, r in _segments(order, segments, ranks, rank)
    ]
    idle = torch.cat([order[: segments[0]], order[segments[-1] :]])
    zeros = x.new_zeros(len(idle), rank, dtype=accumulation(x.dtype))
    place = torch.argsort(torch.cat([idle, *(tokens for tokens, _, _ in used)]))
    y = torch.cat([base[idle], *(y for _, y, _ in used)])[place]
    return y, torch.cat([zeros, *(F.pad(s, (0, rank - s.shape[1])) for _, _, s in used)])[place]


def multi_lora_forward(x, weight, bias, lora_A, lora_B, scaling, ranks, order, segments, y, s) -> None:
    """y = x weight^T + bias;  for every adapter a, on its tokens t:  s[t] = x[t] lora_A[a]^T;
    y[t] += scaling[a] * s[t] lora_B[a]^T.  Without weight, the latter alone.

    lora_A [L, r, K], lora_B [L, N, r], scaling [L] float32, ranks [L] or None; rank rows beyond ranks[a] are not read.
    """
    base = y if weight is None else F.linear(x, weight, bias)
    _write(multi_lora(x, base, lora_A, lora_B, scaling, ranks, order, segments), y, s)


def multi_scale(x, scale, adapters, shift) -> Tensor:
    """scale[a] * x[t] + shift[a] with a = adapters[t], which is any integer; x[t] where there is no such row."""
    known = ((adapters >= 0) & (adapters < len(scale)))[:, None]
    rows, place = x.reshape(-1, x.shape[-1]), adapters.clamp(0, len(scale) - 1)
    wide = rows.to(accumulation(x.dtype)) * torch.where(known, scale[place], 1)  # or what is not finite gets through
    if shift is not None:
        wide = wide + torch.where(known, shift[place], 0)
    return torch.where(known, wide.to(x.dtype), rows).view(x.shape)


def multi_lora_backward(
    dy, x, weight, lora_A, lora_B, scaling, ranks, order, segments, s, dx, dlora_A, dlora_B
) -> None:
    """dx = dy weight, without weight 0;  on the tokens of every adapter a:  ds = scaling[a] * dy lora_B[a];
    dx += ds lora_A[a];  dlora_A[a] = ds^T x;  dlora_B[a] = scaling[a] * dy^T s.  Zero for idle adapters, unused ranks.
    """
    for gradient in (dx, dlora_A, dlora_B):
        if gradient is not None:
            gradient.zero_()
    if dx is not None and weight is not None:
        dx.copy_(dy @ weight)
    sums = accumulation(dy.dtype)
    for a, tokens, r in _segments(order, segments, ranks, lora_A.shape[1]):
        wide = dy[tokens].to(sums) * scaling[a]
        ds = wide @ lora_B[a, :, :r].to(sums)
        if dx is not None:
            dx[tokens] = (dx[tokens] + ds @ lora_A[a, :r].to(sums)).to(dx.dtype)
        if dlora_A is not None:
            dlora_A[a, :r] = (ds.T @ x[tokens].to(sums)).to(dlora_A.dtype)
        if dlora_B is not None:
            dlora_B[a, :, :r] = (wide.T @ s[tokens, :r]).to(dlora_B.dtype)
