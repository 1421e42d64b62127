"""Batched multi-LoRA: every token goes through the adapter of its segment (Chen et al. 2023, Punica, section 4).

Tokens stay in place; kernels reach them through `order`, where those of one adapter lie next to each other.
"""

import torch
import triton
import triton.language as tl

from .blocks import accumulation, blocks, dots, finish, launcher, partial, split
from .tiles import product

SCAN = tl.constexpr(128)  # adapters that a program looks at together when it searches for its tile
MOST_PARTS = 8  # of a sum that one launch adds up itself, in registers


@triton.jit
def rank_of(ranks, adapter, found, R):
    """ranks[adapter], held within [0, R], since nobody has looked at values on a device; R without ranks."""
    rank = R
    if ranks is not None:
        rank = tl.maximum(0, tl.minimum(tl.load(ranks + adapter, mask=found, other=0), R)).to(tl.int32)
    return rank


@triton.jit
def find_tile(segments, ranks, tile, L, R, BLOCK_M: tl.constexpr):
    """(adapter, its rank, first position, end) of tile number `tile`, counting BLOCK_M positions of one adapter a tile,
    adapters in their order; adapter L where there are fewer tiles."""
    adapter = 0
    before = 0  # tiles of the adapters before it
    seen = 0
    for first in range(0, L, SCAN):
        ids = first + tl.arange(0, SCAN)
        inside = ids < L
        length = tl.load(segments + ids + 1, mask=inside, other=0) - tl.load(segments + ids, mask=inside, other=0)
        tiles = tl.cdiv(length, BLOCK_M).to(tl.int32)
        passed = inside & (seen + tl.cumsum(tiles, 0) <= tile)
        adapter += tl.sum(passed.to(tl.int32), 0)
        before += tl.sum(tl.where(passed, tiles, 0), 0)
        seen += tl.sum(tiles, 0)
    found = adapter < L
    position = tl.load(segments + adapter, mask=found, other=0) + (tile - before) * BLOCK_M
    end = tl.load(segments + adapter + 1, mask=found, other=0)
    return adapter, rank_of(ranks, adapter, found, R), position, end


@triton.jit
def shrink_tile(
    x, factor, s, scaling, order, adapter, rank, position, end, first, start, stop, R, x_row, f_adapter, f_rank,
    f_column, DOT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """s[t, j] = scaling[a] * sum over start <= k < stop of x[t, k] factor[a, j, k] on the tokens t of one tile and the
    ranks j from `first` on."""
    positions, ranks_at = position + tl.arange(0, BLOCK_M), first + tl.arange(0, BLOCK_R)
    row_inside, rank_inside = positions < end, ranks_at < rank
    rows = tl.load(order + positions, mask=row_inside, other=0)
    acc = product(
        tl.zeros((BLOCK_R, BLOCK_M), s.dtype.element_ty),
        factor + adapter.to(tl.int64) * f_adapter + ranks_at.to(tl.int64) * f_rank, f_column, rank_inside,
        x + rows * x_row, row_inside, start, stop, DOT, PRECISION, BLOCK_K,
    )  # fmt: skip
    if scaling is not None:
        acc *= tl.load(scaling + adapter).to(acc.dtype)
    tl.store(s + rows[None, :] * R + ranks_at[:, None], acc, mask=rank_inside[:, None] & row_inside[None, :])


@triton.jit
def store_tile(acc, y, scaling, adapter, rows, row_inside, columns, column_inside, y_row, ADD: tl.constexpr):
    """y[rows, columns] = scaling[a] * acc^T;  ADD: += that."""
    if scaling is not None:
        acc *= tl.load(scaling + adapter).to(acc.dtype)
    out = y + rows[None, :] * y_row + columns[:, None]
    inside = column_inside[:, None] & row_inside[None, :]
    if ADD:
        acc += tl.load(out, mask=inside, other=0.0).to(acc.dtype)
    tl.store(out, acc.to(y.dtype.element_ty), mask=inside)


@triton.jit
def multi_shrink_kernel(
    x, factor, s, scaling, ranks, order, segments, T, L, R, K, part, x_row, f_adapter, f_rank, f_column,
    DOT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """On adapter a's tokens t, for j < ranks[a]:  s[h, t, j] = scaling[a] * sum over the k of part h of
    x[t, k] factor[a, j, k].

    x [T, K], factor [L, R, K], scaling [L] or None, s [parts, T, R]. The rest of s is left as it is.
    """
    rank_blocks = tl.cdiv(R, BLOCK_R)
    adapter, rank, position, end = find_tile(segments, ranks, tl.program_id(0) // rank_blocks, L, R, BLOCK_M)
    first = tl.program_id(0) % rank_blocks * BLOCK_R
    if (adapter == L) | (first >= rank):
        return
    start = tl.program_id(1) * part
    shrink_tile(
        x, factor, s + tl.program_id(1).to(tl.int64) * T * R, scaling, order, adapter, rank, position, end, first,
        start, tl.minimum(start + part, K), R, x_row, f_adapter, f_rank, f_column, DOT, PRECISION, BLOCK_M, BLOCK_R,
        BLOCK_K,
    )  # fmt: skip


@triton.jit
def multi_expand_kernel(
    s, factor, y, scaling, ranks, order, segments, L, R, N, f_adapter, f_row, f_rank, y_row,
    ADD: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """y[t] = scaling[a] * s[t, :ranks[a]] factor[a]^T on adapter a's tokens t; ADD: y[t] += that.

    s [T, R], factor [L, N, R], scaling [L] or None, y [T, N]. Other rows of y are left as they are.
    """
    column_blocks = tl.cdiv(N, BLOCK_N)
    adapter, rank, position, end = find_tile(segments, ranks, tl.program_id(0) // column_blocks, L, R, BLOCK_M)
    columns = tl.program_id(0) % column_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    if adapter == L:
        return
    positions = position + tl.arange(0, BLOCK_M)
    row_inside, column_inside = positions < end, columns < N
    rows = tl.load(order + positions, mask=row_inside, other=0)
    acc = product(
        tl.zeros((BLOCK_N, BLOCK_M), s.dtype.element_ty),
        factor + adapter.to(tl.int64) * f_adapter + columns.to(tl.int64) * f_row, f_rank, column_inside,
        s + rows * R, row_inside, 0, rank, DOT, PRECISION, BLOCK_R, STAGES=1,
    )  # fmt: skip
    store_tile(acc, y, scaling, adapter, rows, row_inside, columns, column_inside, y_row, ADD)


@triton.jit
def adapter_at(segments, position, L):
    """The adapter whose tokens are the first at `position` or behind it; L where there are none."""
    adapter = 0
    for first in range(0, L, SCAN):
        ids = first + tl.arange(0, SCAN)
        inside = ids < L
        passed = inside & (tl.load(segments + ids + 1, mask=inside, other=0) <= position)
        adapter += tl.sum(passed.to(tl.int32), 0)
    return adapter


@triton.jit
def multi_linear_kernel(
    x, weight, bias, s, factor, y, scaling, ranks, order, segments, T, L, N, K, R, x_row, w_row, w_column, f_adapter,
    f_row, f_rank, y_row, DOT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """y[t] = x[t] weight^T + scaling[a] * s[t, :ranks[a]] factor[a]^T + bias on adapter a's tokens t; for tokens of no
    adapter without the second term. One accumulator, rounded once.

    x [T, K], weight [N, K], bias [N] or None, s [T, R], factor [L, N, R], scaling [L] or None, y [T, N]. A tile is
    BLOCK_M positions of `order`, whichever adapters': all tiles together take a step for each adapter more than one.
    """
    tiles_m, tiles_n = tl.cdiv(T, BLOCK_M), tl.cdiv(N, BLOCK_N)
    tile = tl.program_id(0)
    tile_m, tile_n = tl.swizzle2d(tile // tiles_n, tile % tiles_n, tiles_m, tiles_n, 8)
    positions = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    row_inside, column_inside = positions < T, columns < N
    column_at = columns.to(tl.int64)
    rows = tl.load(order + positions, mask=row_inside, other=0)
    acc = tl.zeros((BLOCK_N, BLOCK_M), s.dtype.element_ty)
    position, end = (tile_m * BLOCK_M).to(tl.int64), tl.minimum(tile_m * BLOCK_M + BLOCK_M, T).to(tl.int64)
    while position < end:
        adapter = adapter_at(segments, position, L)
        found = adapter < L
        start = tl.load(segments + adapter, mask=found, other=end)
        position = tl.load(segments + adapter + 1, mask=found, other=end)
        rank = rank_of(ranks, adapter, found, R)
        own = row_inside & (positions >= start) & (positions < position)
        branch = product(
            tl.zeros((BLOCK_N, BLOCK_M), s.dtype.element_ty),
            factor + adapter.to(tl.int64) * f_adapter + column_at * f_row, f_rank, column_inside, s + rows * R, own, 0,
            tl.where(start < end, rank, 0), DOT, PRECISION, BLOCK_R, STAGES=1,
        )  # fmt: skip
        if scaling is not None:
            branch *= tl.load(scaling + adapter, mask=found, other=0.0).to(acc.dtype)
        # Tokens of others are zero in the product, and zero times what is not finite is to reach nobody.
        acc += tl.where(own[None, :], branch, 0.0)
    acc = product(
        acc, weight + column_at * w_row, w_column, column_inside, x + rows * x_row, row_inside, 0, K,
        x.dtype.element_ty, "ieee", BLOCK_K,
    )  # fmt: skip
    if bias is not None:
        acc += tl.load(bias + columns, mask=column_inside, other=0.0).to(acc.dtype)[:, None]
    out = y + rows[None, :] * y_row + columns[:, None]
    tl.store(out, acc.to(y.dtype.element_ty), mask=column_inside[:, None] & row_inside[None, :])


@triton.jit
def multi_lora_kernel(
    x, lora_A, lora_B, y, planes, s, scaling, ranks, order, segments, counters, T, L, R, K, N, tiles, part, x_row,
    a_adapter, a_rank, a_column, b_adapter, b_row, b_rank, y_row, PARTS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """multi_shrink and multi_expand in one launch:  s[t] = x[t] lora_A[a]^T;  y[t] += scaling[a] * s[t] lora_B[a]^T.

    planes [PARTS, T, R] with the parts of s; s itself where PARTS is 1. counters [2 + tiles], zero before and after:
    tickets drawn, programs done, and for every tile the pieces of s that are there. Tickets, not program numbers, say
    who does what: the shrinking of all tiles, then their expansion. So whoever waits for s waits for programs that
    run, in whatever order and number programs are started.
    """
    pieces, column_blocks = tl.cdiv(R, BLOCK_R) * PARTS, tl.cdiv(N, BLOCK_N)
    ticket = tl.atomic_add(counters, 1, sem="relaxed")
    expansion = ticket - tiles * pieces
    if expansion < 0:
        tile, piece = ticket // pieces, ticket % pieces
        adapter, rank, position, end = find_tile(segments, ranks, tile, L, R, BLOCK_M)
        first, start = piece // PARTS * BLOCK_R, piece % PARTS * part
        if (adapter < L) & (first < rank):
            shrink_tile(
                x, lora_A, planes + (piece % PARTS).to(tl.int64) * T * R, None, order, adapter, rank, position, end,
                first, start, tl.minimum(start + part, K), R, x_row, a_adapter, a_rank, a_column, x.dtype.element_ty,
                "ieee", BLOCK_M, BLOCK_R, BLOCK_K,
            )  # fmt: skip
        tl.debug_barrier()
        tl.atomic_add(counters + 2 + tile, 1, sem="release")
    else:
        tile, columns = expansion // column_blocks, expansion % column_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
        adapter, rank, position, end = find_tile(segments, ranks, tile, L, R, BLOCK_M)
        if adapter < L:
            positions = position + tl.arange(0, BLOCK_M)
            row_inside, column_inside = positions < end, columns < N
            rows = tl.load(order + positions, mask=row_inside, other=0)
            factor = lora_B + adapter.to(tl.int64) * b_adapter + columns.to(tl.int64) * b_row
            plane = planes + tl.arange(0, PARTS).to(tl.int64)[:, None, None] * T * R + rows[None, None, :] * R
            acc = tl.zeros((BLOCK_N, BLOCK_M), s.dtype.element_ty)
            for first in tl.range(0, rank, BLOCK_R, num_stages=1):
                ranks_at = first + tl.arange(0, BLOCK_R)
                rank_inside = ranks_at < rank
                inside = rank_inside[:, None] & row_inside[None, :]
                # The weights are on their way while s is waited for.
                lhs = tl.load(
                    factor[:, None] + (ranks_at.to(tl.int64) * b_rank)[None, :],
                    mask=column_inside[:, None] & rank_inside[None, :], other=0.0,
                )  # fmt: skip
                while tl.atomic_add(counters + 2 + tile, 0, sem="acquire") < pieces:
                    pass
                tl.debug_barrier()
                parts = tl.load(
                    plane + ranks_at[None, :, None], mask=inside[None, :, :], other=0.0, cache_modifier=".cg"
                )
                rhs = tl.sum(parts, 0)
                if PARTS > 1:
                    summed = inside & (expansion % column_blocks == 0)
                    tl.store(s + rows[None, :] * R + ranks_at[:, None], rhs, mask=summed)
                acc = tl.dot(lhs, rhs.to(lhs.dtype), acc)
            store_tile(acc, y, scaling, adapter, rows, row_inside, columns, column_inside, y_row, True)
    if tl.atomic_add(counters + 1, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        for first in range(0, 2 + tiles, BLOCK_N):
            at = first + tl.arange(0, BLOCK_N)
            tl.store(counters + at, 0, mask=at < 2 + tiles)


@triton.jit
def multi_factor_gradient_kernel(
    t, s, gradient, scaling, ranks, order, segments, R, F, t_row, g_adapter, g_rank, g_column,
    DOT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """gradient[a, j] = scaling[a] * sum over adapter a's tokens m of s[m, j] t[m] for j < ranks[a], else 0.

    t [T, F], s [T, R], scaling [L] or None, gradient [L, R, F] of any strides.
    """
    rank_blocks = tl.cdiv(R, BLOCK_R)
    adapter = tl.program_id(0)
    columns = tl.program_id(1) // rank_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    ranks_at = tl.program_id(1) % rank_blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    column_inside, rank_inside = columns < F, ranks_at < rank_of(ranks, adapter, True, R)
    WIDE: tl.constexpr = s.dtype.element_ty
    acc = tl.zeros((BLOCK_R, BLOCK_N), WIDE)
    end = tl.load(segments + adapter + 1)
    for position in range(tl.load(segments + adapter), end, BLOCK_M):
        positions = position + tl.arange(0, BLOCK_M)
        row_inside = positions < end
        rows = tl.load(order + positions, mask=row_inside, other=0)
        tile = tl.load(
            t + rows[:, None] * t_row + columns[None, :], mask=row_inside[:, None] & column_inside[None, :], other=0.0
        )
        shrunk = tl.load(
            s + rows[None, :] * R + ranks_at[:, None], mask=rank_inside[:, None] & row_inside[None, :], other=0.0
        )
        acc = tl.dot(shrunk.to(DOT), tile.to(DOT), acc, input_precision=PRECISION, out_dtype=WIDE)
    if scaling is not None:
        acc *= tl.load(scaling + adapter).to(WIDE)
    # Unused ranks are zero even where a token holds NaN.
    acc = tl.where(rank_inside[:, None], acc, 0.0)
    out = gradient + adapter.to(tl.int64) * g_adapter
    out += ranks_at.to(tl.int64)[:, None] * g_rank + columns.to(tl.int64)[None, :] * g_column
    tl.store(out, acc.to(gradient.dtype.element_ty), mask=(ranks_at < R)[:, None] & column_inside[None, :])


@launcher
def multi_lora_forward(x, weight, bias, lora_A, lora_B, scaling, ranks, order, segments, y, s):
    """y = x weight^T + bias;  for every adapter a, on its tokens t:  s[t] = x[t] lora_A[a]^T;
    y[t] += scaling[a] * s[t] lora_B[a]^T.  Without weight, the latter alone.

    x [T, K], weight [N, K] of any strides, bias [N] or None, lora_A [L, r, K], lora_B [L, N, r], scaling [L], ranks [L]
    or None, order [T], segments [L + 1]; written: y [T, N], s [T, r]. Rank rows beyond ranks[a] are not read. Grids
    follow from shapes alone.
    """
    routing = ranks, order, segments
    if weight is not None:
        if sizes := _sizes("multi_linear", y, lora_B, lora_B.shape[2]):
            _shrink(x, lora_A, s, None, *routing)
            return _linear(x, weight, bias, s, lora_B, y, scaling, *routing, sizes)
        torch.mm(x, weight.T, out=y) if bias is None else torch.addmm(bias, x, weight.T, out=y)
    if _together(x, lora_A, lora_B, scaling, *routing, y, s):
        return
    _shrink(x, lora_A, s, None, *routing)
    _expand(s, lora_B, y, scaling, *routing, add=True)


@launcher
def multi_lora_backward(dy, x, weight, lora_A, lora_B, scaling, ranks, order, segments, s, dx, dlora_A, dlora_B):
    """dx = dy weight, without weight 0;  on the tokens of every adapter a:  ds = scaling[a] * dy lora_B[a];
    dx += ds lora_A[a];  dlora_A[a] = ds^T x;  dlora_B[a] = scaling[a] * dy^T s.  Zero for idle adapters, unused ranks.

    dy [T, N], the rest as in multi_lora_forward; written, each unless None: dx [T, K], dlora_A, dlora_B.
    """
    routing = ranks, order, segments
    if dlora_B is not None:
        _factor_gradient(dy, s, dlora_B, 1, scaling, *routing)
    if dx is None and dlora_A is None:
        return
    ds = dy.new_empty(len(dy), lora_A.shape[1], dtype=accumulation(dy.dtype))
    _shrink(dy, lora_B.transpose(1, 2), ds, scaling, *routing)
    if dlora_A is not None:
        _factor_gradient(x, ds, dlora_A, 0, None, *routing)
    if dx is None:
        return
    factor = lora_A.transpose(1, 2)
    if weight is None:
        dx.zero_()
        _expand(ds, factor, dx, None, *routing)
    elif sizes := _sizes("multi_linear", dx, factor, factor.shape[2]):
        _linear(dy, weight.T, None, ds, factor, dx, None, *routing, sizes)
    else:
        torch.mm(dy, weight, out=dx)
        _expand(ds, factor, dx, None, *routing, add=True)


def _tiles(tokens, num_adapters, sizes):
    """As many tiles as any routing may need."""
    return triton.cdiv(tokens, sizes["BLOCK_M"]) + min(num_adapters, tokens)


def _sizes(kernel, tensor, factor, rank):
    """Blocks for the tokens that an adapter has on average."""
    tokens = triton.cdiv(len(tensor), min(len(tensor), len(factor)))
    return blocks(kernel, tensor.dtype, tokens, tensor.shape[1], factor.dtype, rank)


COUNTERS: dict[tuple[torch.device, int], torch.Tensor] = {}  # (device, stream) -> zeros


def counters_on(device: torch.device, count: int) -> torch.Tensor:
    """At least `count` int32 zeros for a launch on the current stream, which leaves them zero.

    Launches on one stream share theirs, since they follow each other. One that is captured into a graph, which may be
    replayed on any stream, gets its own, and the graph clears them.
    """
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return torch.zeros(count, dtype=torch.int32, device=device)
    key = device, torch.cuda.current_stream(device).cuda_stream
    if key not in COUNTERS or len(COUNTERS[key]) < count:
        COUNTERS[key] = torch.zeros(max(count, 1024), dtype=torch.int32, device=device)
    return COUNTERS[key]


def _together(x, lora_A, lora_B, scaling, ranks, order, segments, y, s):
    """multi_lora_forward in one launch; False, and nothing done, where two are to be taken."""
    (tokens, depth), (num_adapters, columns, rank) = x.shape, lora_B.shape
    sizes = _sizes("multi_lora", y, lora_B, rank)
    if sizes is None:
        return False
    tiles = _tiles(tokens, num_adapters, sizes)
    counters = counters_on(x.device, 2 + tiles)
    rank_blocks = triton.cdiv(rank, sizes["BLOCK_R"])
    parts, _ = split(depth, sizes["BLOCK_K"], tiles * rank_blocks)
    parts = 1 << min(MOST_PARTS, parts).bit_length() - 1
    part = triton.cdiv(triton.cdiv(depth, parts), sizes["BLOCK_K"]) * sizes["BLOCK_K"]
    programs = tiles * (rank_blocks * parts + triton.cdiv(columns, sizes["BLOCK_N"]))
    multi_lora_kernel[(programs,)](
        x, lora_A, lora_B, y, partial(s, parts, s.dtype), s, scaling, ranks, order, segments, counters, tokens,
        num_adapters, rank, depth, columns, tiles, part, x.stride(0), *lora_A.stride(), *lora_B.stride(), y.stride(0),
        PARTS=parts, **sizes,
    )  # fmt: skip
    return True


def _shrink(x, factor, s, scaling, ranks, order, segments):
    """s[t] = scaling[a] * x[t] factor[a]^T:  factor [L, r, K]."""
    (tokens, depth), (num_adapters, rank, _) = x.shape, factor.shape
    sizes = _sizes("shrink", x, factor, rank)
    programs = _tiles(tokens, num_adapters, sizes) * triton.cdiv(rank, sizes["BLOCK_R"])
    parts, part = split(depth, sizes["BLOCK_K"], programs)
    sums = partial(s, parts, s.dtype)
    multi_shrink_kernel[(programs, parts)](
        x, factor, sums, scaling, ranks, order, segments, tokens, num_adapters, rank, depth, part, x.stride(0),
        *factor.stride(), **dots(x.dtype, factor.dtype), **sizes,
    )  # fmt: skip
    finish(sums, s)


def _expand(s, factor, y, scaling, ranks, order, segments, add=False):
    """y[t] (+)= scaling[a] * s[t] factor[a]^T:  factor [L, N, r]."""
    (tokens, columns), (num_adapters, _, rank) = y.shape, factor.shape
    sizes = _sizes("multi_expand", y, factor, rank)
    programs = _tiles(tokens, num_adapters, sizes) * triton.cdiv(columns, sizes["BLOCK_N"])
    multi_expand_kernel[(programs,)](
        s, factor, y, scaling, ranks, order, segments, num_adapters, rank, columns, *factor.stride(), y.stride(0),
        ADD=add, **dots(y.dtype, factor.dtype, rounded=True), **sizes,
    )  # fmt: skip


def _linear(x, weight, bias, s, factor, y, scaling, ranks, order, segments, sizes):
    """y[t] = x[t] weight^T + scaling[a] * s[t] factor[a]^T + bias:  weight [N, K], factor [L, N, r]."""
    (tokens, depth), (num_adapters, columns, rank) = x.shape, factor.shape
    programs = triton.cdiv(tokens, sizes["BLOCK_M"]) * triton.cdiv(columns, sizes["BLOCK_N"])
    multi_linear_kernel[(programs,)](
        x, weight, bias, s, factor, y, scaling, ranks, order, segments, tokens, num_adapters, columns, depth, rank,
        x.stride(0), *weight.stride(), *factor.stride(), y.stride(0), **dots(x.dtype, factor.dtype, rounded=True),
        **sizes,
    )  # fmt: skip


def _factor_gradient(t, s, gradient, rank_axis, scaling, ranks, order, segments):
    """gradient[a] = scaling[a] * s^T t over adapter a's tokens, its ranks on rank_axis of [L, r, F] or [L, F, r]."""
    columns, rank = t.shape[1], s.shape[1]
    sizes = _sizes("factor_gradient", t, gradient, rank)
    programs = triton.cdiv(columns, sizes["BLOCK_N"]) * triton.cdiv(rank, sizes["BLOCK_R"])
    multi_factor_gradient_kernel[(len(gradient), programs)](
        t, s, gradient, scaling, ranks, order, segments, rank, columns, t.stride(0), gradient.stride(0),
        gradient.stride(1 + rank_axis), gradient.stride(2 - rank_axis), **dots(t.dtype, gradient.dtype), **sizes,
    )  # fmt: skip
