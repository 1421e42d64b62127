"""The low-rank branch: LoRA on a linear layer and alone, and the kernels of what else has one. Equations: README.md."""

import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .blocks import accumulation, blocks, dots, finish, launcher, partial, processors, split, tensor_descriptors
from .tiles import activated, dropout_mask, product, slope


@triton.jit
def shifted(s, shift, ranks, inside):
    """s + shift[ranks], or s where shift is None:  s [ranks, tokens]."""
    if shift is not None:
        s += tl.load(shift + ranks, mask=inside, other=0.0).to(s.dtype)[:, None]
    return s


@triton.jit(do_not_specialize=["drop_below"])
def shrink_kernel(
    x, lora_A, s, seed, middle, shift, M, K, R, part, x_row, a_rank, a_column, scaling: tl.float64,
    drop_below: tl.int64, ACTIVATION: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """s[h, m, j] = scaling * sum over the k of part h of mask(x)[m, k] lora_A[j, k], where middle is given times
    phi'(middle[m, j] + shift[j]).

    x [M, K], lora_A [R, K], s [parts, M, R], middle [M, R], shift [R].
    """
    rank_blocks = tl.cdiv(R, BLOCK_R)
    rows = tl.program_id(0) // rank_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    ranks = tl.program_id(0) % rank_blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    start = tl.program_id(1) * part
    acc = tl.zeros((BLOCK_R, BLOCK_M), s.dtype.element_ty)
    if seed is not None:
        seed = tl.load(seed)
    acc = product(
        acc, lora_A + ranks.to(tl.int64) * a_rank, a_column, ranks < R, x + rows.to(tl.int64) * x_row, rows < M,
        start, tl.minimum(start + part, K), DOT, PRECISION, BLOCK_K, seed=seed, rows=rows, drop_below=drop_below,
    )  # fmt: skip
    acc *= tl.full((1, 1), scaling, acc.dtype)
    at = rows.to(tl.int64)[None, :] * R + ranks[:, None]
    inside = (ranks < R)[:, None] & (rows < M)[None, :]
    if middle is not None:
        acc *= slope(shifted(tl.load(middle + at, mask=inside, other=0.0), shift, ranks, ranks < R), ACTIVATION)
    tl.store(s + tl.program_id(1).to(tl.int64) * M * R + at, acc, mask=inside)


@triton.jit(do_not_specialize=["drop_below"])
def linear_kernel(
    x, weight, scale, bias, s, shift, lora_B, base, y, unscaled, seed, M, N, K, R, x_row, w_row, w_column, s_row, b_row,
    b_rank, base_row, y_row, scaling: tl.float64, drop_below: tl.int64, ACTIVATION: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """unscaled = x weight^T + scaling * mask(phi(s + shift) lora_B^T);  y = base + scale * unscaled + bias. What is
    None is left out; base may be y.

    x [M, K], weight [N, K], scale, bias [N], s [M, R], shift [R], lora_B [N, R], base, y and, with its strides,
    unscaled [M, N]. One accumulator, rounded once.
    """
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    tile = tl.program_id(0)
    tile_m, tile_n = tl.swizzle2d(tile // tiles_n, tile % tiles_n, tiles_m, tiles_n, 8)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    row_inside, column_inside = rows < M, columns < N
    row_at, column_at = rows.to(tl.int64), columns.to(tl.int64)
    acc = tl.zeros((BLOCK_N, BLOCK_M), s.dtype.element_ty)
    # The branch comes first, so that its mask and scale meet it alone in the accumulator.
    acc = product(
        acc, lora_B + column_at * b_row, b_rank, column_inside, s + row_at * s_row, row_inside, 0, R,
        DOT, PRECISION, BLOCK_R, STAGES=1, shift=shift, ACTIVATION=ACTIVATION,
    )  # fmt: skip
    acc *= tl.full((1, 1), scaling, acc.dtype)
    if seed is not None:
        acc *= dropout_mask(tl.load(seed), rows, tile_n * BLOCK_N, drop_below, BLOCK_N, acc.dtype)
    if weight is not None:
        acc = product(
            acc, weight + column_at * w_row, w_column, column_inside, x + row_at * x_row, row_inside, 0, K,
            x.dtype.element_ty, "ieee", BLOCK_K,
        )  # fmt: skip
    inside = column_inside[:, None] & row_inside[None, :]
    at = row_at[None, :] * y_row + columns[:, None]
    if unscaled is not None:
        tl.store(unscaled + at, acc.to(unscaled.dtype.element_ty), mask=inside)
    if scale is not None:
        acc *= tl.load(scale + columns, mask=column_inside, other=0.0).to(acc.dtype)[:, None]
    if bias is not None:
        acc += tl.load(bias + columns, mask=column_inside, other=0.0).to(acc.dtype)[:, None]
    if base is not None:
        acc += tl.load(base + row_at[None, :] * base_row + columns[:, None], mask=inside, other=0.0).to(acc.dtype)
    tl.store(y + at, acc.to(y.dtype.element_ty), mask=inside)


@triton.jit
def concat_linear_kernel(
    x, weight, scale, bias, s, lora_B, y, unscaled, M, N, K, R, s_row, b_row, b_rank, scaling: tl.float64,
    TRANSPOSED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """unscaled = x weight^T + (scaling * s) lora_B^T;  y = scale * unscaled + bias. What is None is left out.

    By tensor descriptors: x [M, K], weight [N, K] or, TRANSPOSED, [K, N], y and unscaled [M, N]; by pointers: scale,
    bias [N], s [M, R], lora_B [N, R]. The branch is the end of the sum over k: one accumulator, rounded once. Any
    number of programs shares the tiles.
    """
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        tile_m, tile_n = tl.swizzle2d(tile // tiles_n, tile % tiles_n, tiles_m, tiles_n, 8)
        row, column = tile_m * BLOCK_M, tile_n * BLOCK_N
        acc = tl.zeros((BLOCK_N, BLOCK_M), s.dtype.element_ty)
        for k in range(0, K, BLOCK_K):
            lhs = weight.load([k, column]).T if TRANSPOSED else weight.load([column, k])
            acc = tl.dot(lhs, x.load([row, k]).T, acc)
        rows, columns = row + tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_N)
        row_inside, column_inside = rows < M, columns < N
        row_at, column_at = rows.to(tl.int64), columns.to(tl.int64)
        for first in tl.range(0, R, BLOCK_R, num_stages=1):
            ranks = first + tl.arange(0, BLOCK_R)
            lhs = tl.load(
                lora_B + (column_at * b_row)[:, None] + (ranks.to(tl.int64) * b_rank)[None, :],
                mask=column_inside[:, None] & (ranks < R)[None, :], other=0.0,
            )  # fmt: skip
            rhs = tl.load(
                s + (row_at * s_row)[None, :] + ranks[:, None],
                mask=(ranks < R)[:, None] & row_inside[None, :],
                other=0.0,
            )
            rhs *= tl.full((1, 1), scaling, rhs.dtype)
            acc = tl.dot(lhs, rhs.to(lhs.dtype), acc)
        if unscaled is not None:
            unscaled.store([row, column], acc.to(unscaled.dtype).T)
        if scale is not None:
            acc *= tl.load(scale + columns, mask=column_inside, other=0.0).to(acc.dtype)[:, None]
        if bias is not None:
            acc += tl.load(bias + columns, mask=column_inside, other=0.0).to(acc.dtype)[:, None]
        y.store([row, column], acc.to(y.dtype).T)


@triton.jit(do_not_specialize=["drop_below"])
def factor_gradient_kernel(
    t, s, shift, gradient, lora_B, ds, seed, M, F, R, part, t_row, s_row, g_rank, g_column, scaling: tl.float64,
    drop_below: tl.int64, ACTIVATION: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """gradient[h, j, f] = scaling * sum over the rows m of part h of phi(s + shift)[m, j] mask(t)[m, f]; and, where
    lora_B is given, ds[i, m, j] = scaling * sum over the columns f of block i of t[m, f] lora_B[f, j].

    t [M, F], s [M, R] of any row stride, shift [R], gradient [parts, R, F] of any strides, lora_B [F, R],
    ds [F / BLOCK_N, M, R].
    """
    rank_blocks = tl.cdiv(R, BLOCK_R)
    block = tl.program_id(0) // rank_blocks
    columns = block * BLOCK_N + tl.arange(0, BLOCK_N)
    ranks = tl.program_id(0) % rank_blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    column_inside, rank_inside = columns < F, ranks < R
    inside = rank_inside[:, None] & column_inside[None, :]
    WIDE: tl.constexpr = s.dtype.element_ty
    acc = tl.zeros((BLOCK_R, BLOCK_N), WIDE)
    if seed is not None:
        seed = tl.load(seed)
    if lora_B is not None:
        factor = tl.load(lora_B + columns.to(tl.int64)[None, :] * R + ranks[:, None], mask=inside, other=0.0).to(DOT)
    start = tl.program_id(1) * part
    for m in range(start, tl.minimum(start + part, M), BLOCK_M):
        rows = m + tl.arange(0, BLOCK_M)
        row_at, row_inside = rows.to(tl.int64), rows < M
        tile = tl.load(
            t + row_at[:, None] * t_row + columns[None, :], mask=row_inside[:, None] & column_inside[None, :], other=0.0
        )
        if seed is not None:
            mask = tl.trans(dropout_mask(seed, rows, block * BLOCK_N, drop_below, BLOCK_N, WIDE))
            tile = (tile.to(WIDE) * mask).to(tile.dtype)
        at = row_at[None, :] * R + ranks[:, None]
        s_inside = rank_inside[:, None] & row_inside[None, :]
        own = tl.load(s + row_at[None, :] * s_row + ranks[:, None], mask=s_inside, other=0.0)
        shrunk = shifted(own, shift, ranks, rank_inside)
        if ACTIVATION is not None:
            shrunk = tl.where(s_inside, activated(shrunk, ACTIVATION), 0.0)
        acc = tl.dot(shrunk.to(DOT), tile.to(DOT), acc, input_precision=PRECISION, out_dtype=WIDE)
        if lora_B is not None:
            sums = tl.dot(factor, tl.trans(tile.to(DOT)), input_precision=PRECISION, out_dtype=WIDE)
            sums *= tl.full((1, 1), scaling, WIDE)
            tl.store(ds + block.to(tl.int64) * M * R + at, sums, mask=s_inside)
    acc *= tl.full((1, 1), scaling, WIDE)
    out = gradient + tl.program_id(1).to(tl.int64) * R * F
    out += ranks.to(tl.int64)[:, None] * g_rank + columns.to(tl.int64)[None, :] * g_column
    tl.store(out, acc.to(gradient.dtype.element_ty), mask=inside)


@launcher
def lora_forward(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed, y, s):
    """s = drop(x) lora_A^T;  y = x weight^T + bias + scaling * s lora_B^T.  Without weight: y += scaling * s lora_B^T.

    x [M, K], weight [N, K] of any strides, lora_A [r, K], lora_B [N, r]; written: y [M, N], s [M, r].
    """
    shrink(x, lora_A, s, dropout_scale(dropout_p, seed), dropout_p, seed)
    linear(x, weight, bias, s, lora_B, y, scaling, base=y if weight is None else None)


@launcher
def lora_backward(dy, x, weight, lora_A, lora_B, scaling, dropout_p, seed, s, dx, dlora_A, dlora_B):
    """ds = scaling * dy lora_B;  dlora_B = scaling * dy^T s;  dlora_A = ds^T drop(x);
    dx = dy weight + drop'(ds lora_A), without weight the second term alone.

    dy [M, N], the rest as in lora_forward; written, each unless None: dx [M, K], dlora_A [r, K], dlora_B [N, r].
    """
    drop_scale = dropout_scale(dropout_p, seed)
    ds = None
    if dx is not None or dlora_A is not None:
        ds = dy.new_empty(len(dy), len(lora_A), dtype=accumulation(dy.dtype))
    expand_backward(dy, s, lora_B, scaling, ds, dlora_B)
    if dlora_A is not None:
        factor_gradient(x, ds, dlora_A, 0, drop_scale, dropout_p, seed)
    if dx is not None:
        linear(dy, None if weight is None else weight.T, None, ds, lora_A.T, dx, drop_scale, dropout_p, seed)


def dropout_scale(dropout_p, seed):
    """What an element that dropout keeps is multiplied by; 1 where nothing is dropped."""
    return 1.0 if seed is None else 1.0 / (1.0 - dropout_p)


def _drop_below(dropout_p):
    return int(dropout_p * 2**32)


def shrink(x, factor, s, scaling, dropout_p=0.0, seed=None, middle=None, shift=None, activation=None):
    """s = scaling * mask(x) factor^T, given middle times phi'(middle + shift):  x [M, K], factor [r, K], s [M, r]."""
    (rows, depth), rank = x.shape, len(factor)
    sizes = blocks("shrink", x.dtype, rows, depth, factor.dtype, rank)
    programs = triton.cdiv(rows, sizes["BLOCK_M"]) * triton.cdiv(rank, sizes["BLOCK_R"])
    parts, part = split(depth, sizes["BLOCK_K"], programs)
    sums = partial(s, parts, s.dtype)
    shrink_kernel[(programs, parts)](
        x, factor, sums, seed, middle, shift, rows, depth, rank, part, x.stride(0), *factor.stride(), scaling,
        _drop_below(dropout_p), ACTIVATION=activation, **dots(x.dtype, factor.dtype), **sizes,
    )  # fmt: skip
    finish(sums, s)


def linear(
    x, weight, bias, s, factor, y, scaling, dropout_p=0.0, seed=None, base=None, scale=None, unscaled=None, shift=None,
    activation=None,
):  # fmt: skip
    """y = base + scale * (x weight^T + scaling * mask(phi(s + shift) factor^T)) + bias:  weight [N, K], factor [N, r],
    s [M, r]; each of the others may be None."""
    (rows, columns), depth, rank = y.shape, x.shape[1], s.shape[1]
    plain = weight is not None and seed is None and base is None
    if plain and _concat_linear(x, weight, bias, s, factor, y, scaling, scale, unscaled):
        return
    sizes = blocks("linear", x.dtype, rows, columns, factor.dtype, rank)
    if unscaled is not None and x.dtype.itemsize == 4:
        sizes["num_stages"] = 2  # registers that its addresses take
    if weight is None and sizes["BLOCK_M"] * sizes["BLOCK_N"] >= 4096:
        sizes["num_warps"] = 8  # the same
    programs = triton.cdiv(rows, sizes["BLOCK_M"]) * triton.cdiv(columns, sizes["BLOCK_N"])
    strides = (0, 0) if weight is None else weight.stride()
    linear_kernel[(programs,)](
        x, weight, scale, bias, s, shift, factor, base, y, unscaled, seed, rows, columns, depth, rank, x.stride(0),
        *strides, s.stride(0), *factor.stride(), 0 if base is None else base.stride(0), y.stride(0), scaling,
        _drop_below(dropout_p), ACTIVATION=activation, **dots(x.dtype, factor.dtype, rounded=True), **sizes,
    )  # fmt: skip


def _concat_linear(x, weight, bias, s, factor, y, scaling, scale, unscaled):
    """linear by tensor descriptors; False, and nothing done, where they do not fit or another kernel does better."""
    if not tensor_descriptors():
        return False
    (rows, columns), depth, rank = y.shape, x.shape[1], s.shape[1]
    sizes = blocks("concat_linear", x.dtype, rows, columns, factor.dtype, rank)
    transposed = weight.stride(1) != 1
    stored = weight.T if transposed else weight
    outputs = [y] if unscaled is None else [y, unscaled]
    if sizes is None or not all(map(_described, (x, stored, *outputs))):
        return False
    block_m, block_n, block_k = (sizes[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
    tiles = triton.cdiv(rows, block_m) * triton.cdiv(columns, block_n)
    describe = TensorDescriptor.from_tensor
    out, out_unscaled = (None if t is None else describe(t, [block_m, block_n]) for t in (y, unscaled))
    concat_linear_kernel[lambda _: (min(tiles, processors(x.device)),)](
        describe(x, [block_m, block_k]), describe(stored, [block_k, block_n] if transposed else [block_n, block_k]),
        scale, bias, s, factor, out, out_unscaled, rows, columns, depth, rank, s.stride(0), *factor.stride(), scaling,
        TRANSPOSED=transposed, **sizes,
    )  # fmt: skip
    return True


def _described(tensor):
    """Whether a tensor descriptor takes it: rows of contiguous elements that begin at multiples of 16 bytes."""
    row, column = tensor.stride()
    aligned = tensor.data_ptr() % 16 == 0 and row * tensor.itemsize % 16 == 0
    return column == 1 and row >= tensor.shape[1] and aligned


def factor_gradient(
    t, s, gradient, rank_axis, scaling, dropout_p=0.0, seed=None, lora_B=None, ds=None, shift=None, activation=None
):
    """gradient = scaling * phi(s + shift)^T mask(t), its ranks on rank_axis, and, given ds,
    ds = scaling * t lora_B:  t [M, F]."""
    (rows, columns), rank = t.shape, s.shape[1]
    sizes = blocks("factor_gradient", t.dtype, rows, columns, gradient.dtype, rank)
    column_blocks = triton.cdiv(columns, sizes["BLOCK_N"])
    programs = column_blocks * triton.cdiv(rank, sizes["BLOCK_R"])
    parts, part = split(rows, sizes["BLOCK_M"], programs)
    sums = partial(gradient, parts, s.dtype)
    blocks_of_ds = None if ds is None else partial(ds, column_blocks, ds.dtype)
    factor_gradient_kernel[(programs, parts)](
        t, s, shift, sums, None if ds is None else lora_B, blocks_of_ds, seed, rows, columns, rank, part, t.stride(0),
        s.stride(0), sums.stride(1 + rank_axis), sums.stride(2 - rank_axis), scaling, _drop_below(dropout_p),
        ACTIVATION=activation, **dots(t.dtype, gradient.dtype), **sizes,
    )  # fmt: skip
    finish(sums, gradient)
    if ds is not None:
        finish(blocks_of_ds, ds)


def expand_backward(dy, s, lora_B, scaling, ds, dlora_B, shift=None, activation=None):
    """dlora_B = scaling * dy^T phi(s + shift);  ds = scaling * dy lora_B * phi'(s + shift): what is not None."""
    rank, middle = lora_B.shape[1], {"shift": shift, "activation": activation}
    # One pass over dy serves both, unless ds in blocks of columns would weigh more than reading dy again, or phi' would
    # take more registers than there are.
    block = blocks("factor_gradient", dy.dtype, *dy.shape, lora_B.dtype)["BLOCK_N"]
    together = ds is not None and dlora_B is not None and activation is None
    together = together and 2 * rank * ds.itemsize <= block * dy.itemsize
    if dlora_B is not None:
        factor_gradient(dy, s, dlora_B, 1, scaling, lora_B=lora_B, ds=ds if together else None, **middle)
    if ds is not None and not together:
        shrink(dy, lora_B.T, ds, scaling, middle=None if activation is None else s, **middle)
