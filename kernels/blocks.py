"""Block sizes and what else the launchers derive from shapes and dtypes. Nothing here looks at a value on a device.

BLOCKS is the one table from which launchers choose and which the ahead-of-time test compiles for every target.
"""

import functools
import math

import torch
import triton
import triton.language as tl

ANY = math.inf


def _entry(m, n, k, warps, stages):
    sizes = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k}
    return {name: size for name, size in sizes.items() if size} | {"num_warps": warps, "num_stages": stages}


# kernel -> width of its operands -> (tokens at most, [tokens, features, depth] of a tile, warps, stages). Every entry
# fits 64 KiB of shared memory on gfx942 and 163 KiB on sm_80.
BLOCKS = {
    "linear": {
        "half": [(16, _entry(16, 32, 128, 4, 4)), (64, _entry(64, 64, 64, 4, 4)), (ANY, _entry(128, 128, 64, 8, 3))],
        "mixed": [(16, _entry(16, 32, 128, 4, 4)), (64, _entry(64, 64, 64, 4, 4)), (ANY, _entry(128, 128, 64, 8, 3))],
        "single": [(16, _entry(16, 32, 64, 4, 3)), (ANY, _entry(64, 64, 32, 4, 3))],
        "double": [(16, _entry(16, 32, 32, 4, 3)), (ANY, _entry(64, 64, 16, 4, 3))],
    },
    "ia3_linear": {
        "half": [(16, _entry(16, 32, 128, 4, 4)), (64, _entry(64, 64, 64, 4, 4)), (ANY, _entry(128, 128, 32, 8, 4))],
        "single": [(16, _entry(16, 32, 32, 4, 3)), (ANY, _entry(64, 64, 16, 4, 3))],
        "double": [(16, _entry(16, 32, 16, 4, 3)), (ANY, _entry(32, 32, 16, 4, 3))],
    },
    "shrink": {
        "half": [(16, _entry(16, 0, 128, 4, 4)), (ANY, _entry(64, 0, 64, 4, 4))],
        "mixed": [(16, _entry(16, 0, 64, 4, 4)), (ANY, _entry(64, 0, 32, 4, 4))],
        "single": [(16, _entry(16, 0, 64, 4, 3)), (ANY, _entry(64, 0, 32, 4, 3))],
        "double": [(16, _entry(16, 0, 32, 4, 3)), (ANY, _entry(64, 0, 16, 4, 3))],
    },
    "multi_expand": {
        "half": [(16, _entry(16, 64, 0, 4, 2)), (ANY, _entry(64, 128, 0, 4, 2))],
        "mixed": [(16, _entry(16, 64, 0, 4, 2)), (ANY, _entry(64, 128, 0, 4, 2))],
        "single": [(16, _entry(16, 64, 0, 4, 2)), (ANY, _entry(64, 64, 0, 4, 2))],
        "double": [(16, _entry(16, 64, 0, 4, 2)), (ANY, _entry(64, 64, 0, 4, 2))],
    },
    "factor_gradient": {
        "half": [(ANY, _entry(32, 256, 0, 8, 3))],
        "mixed": [(ANY, _entry(32, 128, 0, 8, 3))],
        "single": [(ANY, _entry(32, 64, 0, 4, 2))],
        "double": [(ANY, _entry(32, 64, 0, 4, 2))],
    },
    "column_sums": {width: [(ANY, _entry(32, 128, 0, 4, 1))] for width in ("half", "single", "double")},
}
RANK_BLOCKS = {"half": (16, 32), "mixed": (16,), "single": (16,), "double": (16,)}
PROGRAMS = 256  # what a launch is split into at least, where it may be: about two for every multiprocessor


def width(dtype: torch.dtype, adapters: torch.dtype | None = None) -> str:
    """The row of BLOCKS for activations of `dtype` under adapters of another."""
    kind = {8: "double", 4: "single", 2: "half"}[dtype.itemsize]
    return "mixed" if kind == "half" and adapters not in (None, dtype) else kind


def blocks(kernel: str, dtype: torch.dtype, tokens: int, adapters: torch.dtype | None = None) -> dict[str, int]:
    """Block sizes, warps and stages of `kernel` for so many tokens."""
    return next(entry for most, entry in BLOCKS[kernel][width(dtype, adapters)] if tokens <= most)


def rank_block(rank: int, dtype: torch.dtype, adapters: torch.dtype) -> int:
    sizes = RANK_BLOCKS[width(dtype, adapters)]
    return next((size for size in sizes if rank <= size), sizes[-1])


def accumulation(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which products are summed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


DTYPES = {torch.float64: tl.float64, torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def dots(dtype: torch.dtype, adapters: torch.dtype) -> dict:
    """How the low-rank branch multiplies: in the activations' dtype where the adapters share it, else in the dtype of
    sums, for which NVIDIA's tensor cores take three tf32 products in place of one float32 product."""
    if dtype == adapters:
        return {"DOT": DTYPES[dtype], "PRECISION": "ieee"}
    tf32 = width(dtype, adapters) == "mixed" and not torch.version.hip
    return {"DOT": DTYPES[accumulation(dtype)], "PRECISION": "tf32x3" if tf32 else "ieee"}


def split(length: int, block: int, programs: int, least: int = 4) -> tuple[int, int]:
    """(parts, length of a part): cuts a sum into parts of at least `least` blocks, as many as PROGRAMS asks for."""
    steps = triton.cdiv(length, block)
    parts = max(1, min(triton.cdiv(PROGRAMS, max(programs, 1)), steps // least))
    steps = triton.cdiv(steps, parts)
    return triton.cdiv(length, steps * block), steps * block


def partial(out: torch.Tensor, parts: int, dtype: torch.dtype) -> torch.Tensor:
    """Where a kernel puts its partial sums of `out`: [parts, *out.shape], or `out` itself where there is one part."""
    return out[None] if parts == 1 else out.new_empty(parts, *out.shape, dtype=dtype)


def finish(sums: torch.Tensor, out: torch.Tensor) -> None:
    """Add partial sums up, always in the same order, rounding once."""
    if len(sums) > 1:
        out.copy_(sums.sum(0))


def threshold(p: float) -> int:
    """Elements whose random word is below it are dropped."""
    return int(p * 2**32)


def launcher(function):
    """Makes the device of the first tensor current while kernels are launched."""

    @functools.wraps(function)
    def launch(first, *rest):
        with torch.cuda.device_of(first):
            function(first, *rest)

    return launch
