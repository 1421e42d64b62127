"""Tile loops that the kernels share.

In every product the weight side (W, A, B) is the left operand and the token side (x, dy, s) the right one, so that
whatever is done to tokens on the way (dropout, IA3's scale, a cast) is done to the right operand: README.md says why.
"""

import triton
import triton.language as tl


@triton.jit
def dropout_mask(seed, rows, first, drop_below, COLUMNS: tl.constexpr, DTYPE: tl.constexpr):
    """[COLUMNS, rows]: 1 where element (rows[m], first + k) is kept, else 0; first is a multiple of 4.

    (m, k) is kept iff word k % 4 of Philox4x32-10 under the key seed, at counter (k // 4, m, 0, 0), reaches drop_below.
    """
    quads = (first // 4 + tl.arange(0, COLUMNS // 4))[None, :]
    zeros = tl.zeros((1, 1), tl.int32)
    w0, w1, w2, w3 = tl.philox(seed, quads, rows[:, None], zeros, zeros)  # [rows, COLUMNS / 4] each
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))  # [rows, COLUMNS]
    return tl.trans(tl.where(words >= drop_below.to(tl.uint32), 1.0, 0.0).to(DTYPE))


@triton.jit
def logistic(v):
    return 1 / (1 + tl.exp(-v))


@triton.jit
def tanh(v):
    """Below 1/2 the eighth convergent of its continued fraction, since 1 - 2 / (e^2v + 1) cancels there."""
    size, q = tl.abs(v), v * v
    small = v * (((36 * q + 6930) * q + 270270) * q + 2027025)
    small /= (((q + 630) * q + 51975) * q + 945945) * q + 2027025
    large = 1 - 2 / (tl.exp(2 * size) + 1)
    return tl.where(size < 0.5, small, tl.where(v < 0, -large, large))


@triton.jit
def activated(v, ACTIVATION: tl.constexpr):
    """phi(v)."""
    if ACTIVATION == "relu":
        v = tl.where(v < 0, 0.0, v)
    elif ACTIVATION == "gelu":
        v *= 0.5 * (1 + tl.erf(v * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        v *= logistic(1.5957691216057308 * v * (1 + 0.044715 * v * v))
    elif ACTIVATION == "silu":
        v *= logistic(v)
    elif ACTIVATION == "tanh":
        v = tanh(v)
    return v


@triton.jit
def slope(v, ACTIVATION: tl.constexpr):
    """phi'(v)."""
    if ACTIVATION == "relu":
        v = tl.where(v <= 0, 0.0, 1.0).to(v.dtype)
    elif ACTIVATION == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * v * v)
        v = 0.5 * (1 + tl.erf(v * 0.7071067811865476)) + v * density
    elif ACTIVATION == "gelu_tanh":
        share = logistic(1.5957691216057308 * v * (1 + 0.044715 * v * v))
        v = share + v * share * (1 - share) * 1.5957691216057308 * (1 + 0.134145 * v * v)
    elif ACTIVATION == "silu":
        share = logistic(v)
        v = share + v * share * (1 - share)
    elif ACTIVATION == "tanh":
        v = tanh(v)
        v = 1 - v * v
    else:
        v = tl.full(v.shape, 1.0, v.dtype)
    return v


@triton.jit
def product(
    acc,  # [BLOCK_L, BLOCK_M]
    left,  # [BLOCK_L] pointers to the first elements of the left operand's rows
    left_stride,
    left_inside,  # [BLOCK_L]
    right,  # [BLOCK_M] pointers to tokens, whose elements are contiguous
    right_inside,  # [BLOCK_M]
    start,
    end,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr = None,
    scale=None,
    shift=None,
    ACTIVATION: tl.constexpr = None,
    seed=None,
    rows=None,
    drop_below=None,
):
    """acc[l, m] + sum over start <= k < end of left[l, k] right[m, k], right multiplied by scale[k] or by the dropout
    mask of (rows[m], k) where given and rounded to its own dtype, or made phi(right + shift[k]); the operands are cast
    to DOT."""
    ks = tl.arange(0, BLOCK_K)
    for k in tl.range(start, end, BLOCK_K, num_stages=STAGES):
        inside = ks < end - k
        at = (k + ks).to(tl.int64)
        lhs = tl.load(
            left[:, None] + (at * left_stride)[None, :], mask=left_inside[:, None] & inside[None, :], other=0.0
        )
        rhs = tl.load(right[None, :] + at[:, None], mask=inside[:, None] & right_inside[None, :], other=0.0)
        if scale is not None:
            factor = tl.load(scale + at, mask=inside, other=0.0).to(acc.dtype)
            rhs = (rhs.to(acc.dtype) * factor[:, None]).to(rhs.dtype)
        if shift is not None:
            rhs += tl.load(shift + at, mask=inside, other=0.0).to(rhs.dtype)[:, None]
        if ACTIVATION is not None:
            rhs = activated(rhs, ACTIVATION)
        if seed is not None:
            mask = dropout_mask(seed, rows, k, drop_below, BLOCK_K, acc.dtype)
            rhs = (rhs.to(acc.dtype) * mask).to(rhs.dtype)
        acc = tl.dot(lhs.to(DOT), rhs.to(DOT), acc, input_precision=PRECISION, out_dtype=acc.dtype)
    return acc
