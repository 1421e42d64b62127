"""IA3 on a linear layer: the scale meets the input tile on its way in, or the accumulator on its way out."""

import triton
import triton.language as tl

from .blocks import DTYPES, accumulation, blocks, finish, launcher, partial, split
from .tiles import product


@triton.jit
def ia3_linear_kernel(
    x, weight, bias, scale_in, scale_out, y, base, other, sums, M, N, K, x_row, w_row, w_column, y_row, other_row,
    WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """base = (x * scale_in) weight^T + bias;  y = base * scale_out;  sums[i, n] = sum over the rows m of tile i of
    base[m, n] other[m, n]. A scale that is None is 1; an output that is None is not formed.

    x [M, K], weight [N, K], bias [N], scale_in [K], scale_out [N], y, base, other [M, N], sums [M / BLOCK_M, N].
    """
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    tile = tl.program_id(0)
    tile_m, tile_n = tl.swizzle2d(tile // tiles_n, tile % tiles_n, tiles_m, tiles_n, 8)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    row_inside, column_inside = rows < M, columns < N
    row_at, column_at = rows.to(tl.int64), columns.to(tl.int64)
    acc = product(
        tl.zeros((BLOCK_N, BLOCK_M), WIDE), weight + column_at * w_row, w_column, column_inside,
        x + row_at * x_row, row_inside, 0, K, x.dtype.element_ty, "ieee", BLOCK_K, scale=scale_in,
    )  # fmt: skip
    inside = column_inside[:, None] & row_inside[None, :]
    if bias is not None:
        acc += tl.load(bias + columns, mask=column_inside, other=0.0).to(WIDE)[:, None]
    if base is not None:
        tl.store(base + row_at[None, :] * N + columns[:, None], acc.to(base.dtype.element_ty), mask=inside)
    if sums is not None:
        against = tl.load(other + row_at[None, :] * other_row + columns[:, None], mask=inside, other=0.0)
        total = tl.sum(tl.where(inside, acc * against.to(WIDE), 0.0), axis=1)
        tl.store(sums + tile_m.to(tl.int64) * N + columns, total.to(sums.dtype.element_ty), mask=column_inside)
    if scale_out is not None:
        acc *= tl.load(scale_out + columns, mask=column_inside, other=0.0).to(WIDE)[:, None]
    if y is not None:
        tl.store(y + row_at[None, :] * y_row + columns[:, None], acc.to(y.dtype.element_ty), mask=inside)


@triton.jit
def column_sums_kernel(
    a, b, sums, scale, scaled, M, N, part, a_row, b_row, WIDE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """sums[h, n] = sum over the rows m of part h of a[m, n] b[m, n];  scaled = a * scale. What is None is not formed.

    a, b, scaled [M, N], scale [N], sums [parts, N].
    """
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    start = tl.program_id(1) * part
    end = tl.minimum(start + part, M)
    acc = tl.zeros((BLOCK_M, BLOCK_N), WIDE)
    if scale is not None:
        factor = tl.load(scale + columns, mask=columns < N, other=0.0).to(WIDE)[None, :]
    for m in range(start, end, BLOCK_M):
        rows = (m + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None]
        inside = (rows < end) & (columns < N)[None, :]
        left = tl.load(a + rows * a_row + columns[None, :], mask=inside, other=0.0).to(WIDE)
        if sums is not None:
            right = tl.load(b + rows * b_row + columns[None, :], mask=inside, other=0.0)
            acc += left * right.to(WIDE)
        if scale is not None:
            out = scaled + rows * N + columns[None, :]
            tl.store(out, (left * factor).to(scaled.dtype.element_ty), mask=inside)
    if sums is not None:
        out = sums + tl.program_id(1).to(tl.int64) * N + columns
        tl.store(out, tl.sum(acc, axis=0).to(sums.dtype.element_ty), mask=columns < N)


@launcher
def ia3_forward(x, weight, bias, ia3_l, feedforward, y, base):
    """feedforward: y = (x * ia3_l) weight^T + bias.  Otherwise: base = x weight^T + bias;  y = base * ia3_l.

    x [M, K], weight [N, K] of any strides, ia3_l [K] or [N]; written: y [M, N] and, unless None, base [M, N].
    """
    scales = (ia3_l, None) if feedforward else (None, ia3_l)
    _linear(x, weight, bias, *scales, y, None if feedforward else base)


@launcher
def ia3_backward(dy, x, weight, ia3_l, feedforward, base, dx, dia3_l):
    """feedforward: g = dy weight;  dx = g * ia3_l;  dia3_l = sum over rows of g * x.
    Otherwise: dia3_l = sum over rows of dy * base;  dx = (dy * ia3_l) weight.

    dy [M, N]; written, each unless None: dx [M, K] and dia3_l, of ia3_l's shape.
    """
    if feedforward:
        _linear(dy, weight.T, None, None, ia3_l, dx, other=x, total=dia3_l)
        return
    if dia3_l is not None:
        column_sums(dy, base, dia3_l)
    if dx is not None:
        _linear(dy, weight.T, None, ia3_l, None, dx)


def _linear(x, weight, bias, scale_in, scale_out, y, base=None, other=None, total=None):
    rows, (columns, depth) = len(x), weight.shape
    sizes = blocks("ia3_linear", x.dtype, rows, columns, x.dtype)
    tiles_m = triton.cdiv(rows, sizes["BLOCK_M"])
    wide = accumulation(x.dtype)
    sums = None if total is None else partial(total, tiles_m, wide)
    ia3_linear_kernel[(tiles_m * triton.cdiv(columns, sizes["BLOCK_N"]),)](
        x, weight, bias, scale_in, scale_out, y, base, other, sums, rows, columns, depth, x.stride(0), *weight.stride(),
        0 if y is None else y.stride(0), 0 if other is None else other.stride(0), WIDE=DTYPES[wide], **sizes,
    )  # fmt: skip
    if total is not None:
        finish(sums, total)


def column_sums(a, b, total, scale=None, scaled=None):
    """total = sum over rows of a * b;  scaled = a * scale: what is not None of these, in one pass."""
    rows, columns = a.shape
    sizes = blocks("column_sums", a.dtype, rows, columns, a.dtype)
    programs = triton.cdiv(columns, sizes["BLOCK_N"])
    parts, part = split(rows, sizes["BLOCK_M"], programs)
    wide = accumulation(a.dtype)
    sums = None if total is None else partial(total, parts, wide)
    column_sums_kernel[(programs, parts)](
        a, b, sums, scale, scaled, rows, columns, part, a.stride(0), 0 if b is None else b.stride(0), WIDE=DTYPES[wide],
        **sizes,
    )  # fmt: skip
    if total is not None:
        finish(sums, total)
