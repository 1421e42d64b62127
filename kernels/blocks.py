"""Block sizes, and what else the launchers derive from shapes and dtypes. Nothing here looks at a value on a device.

BLOCKS is the rule by which the launchers choose, and the ahead-of-time test compiles all of it for every target that
may run it. Where tuning/ holds measurements of the present architecture (`python -m benchmarks.tune` makes them), those
go before the rule.
"""

import functools
import json
import math
from pathlib import Path

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget

ANY = math.inf
TUNING = Path(__file__).parent / "tuning"


def entry(tokens: int, features: int, depth: int, num_warps: int, num_stages: int) -> dict[str, int]:
    """Blocks as the kernels take them; 0 where a kernel has no such block."""
    sizes = {"BLOCK_M": tokens, "BLOCK_N": features, "BLOCK_K": depth}
    return {name: size for name, size in sizes.items() if size} | {"num_warps": num_warps, "num_stages": num_stages}


# kernel -> kind of its operands -> (tokens at most, blocks; None: not this kernel). Every entry spills no register and
# fits the 64 KiB of shared memory of gfx942 and the 99 KiB of sm_86, sm_89 and sm_120; those of concat_linear, which
# needs tensor descriptors, the 227 KiB of sm_90 and sm_100. "mixed" is 16-bit activations under adapters of another
# dtype.
BLOCKS = {
    "linear": {
        "half": [(16, entry(16, 32, 128, 4, 4)), (64, entry(64, 64, 64, 4, 4)), (ANY, entry(128, 128, 64, 8, 3))],
        "mixed": [(16, entry(16, 32, 128, 4, 4)), (64, entry(64, 64, 64, 4, 4)), (ANY, entry(128, 128, 64, 8, 3))],
        "mixed float16": [(16, entry(16, 32, 128, 4, 4)), (ANY, entry(128, 32, 64, 4, 3))],
        "single": [(16, entry(16, 32, 64, 4, 3)), (ANY, entry(64, 64, 32, 4, 3))],
        "double": [(ANY, entry(32, 32, 16, 4, 2))],
    },
    "concat_linear": {"half": [(1023, None), (ANY, entry(256, 128, 64, 8, 3))]},
    "ia3_linear": {
        "half": [(16, entry(16, 32, 128, 4, 4)), (64, entry(64, 64, 64, 4, 4)), (ANY, entry(128, 128, 64, 8, 2))],
        "single": [(16, entry(16, 32, 32, 4, 3)), (ANY, entry(64, 64, 16, 4, 3))],
        "double": [(ANY, entry(32, 32, 16, 4, 2))],
    },
    "shrink": {
        "half": [(16, entry(16, 0, 128, 4, 4)), (ANY, entry(64, 0, 64, 4, 4))],
        "mixed": [(16, entry(16, 0, 64, 4, 4)), (ANY, entry(64, 0, 32, 4, 4))],
        "single": [(16, entry(16, 0, 64, 4, 3)), (ANY, entry(64, 0, 32, 4, 3))],
        "double": [(ANY, entry(32, 0, 16, 4, 2))],
    },
    "multi_expand": {
        "half": [(16, entry(16, 64, 0, 4, 1)), (ANY, entry(64, 128, 0, 4, 1))],
        "mixed": [(16, entry(16, 64, 0, 4, 1)), (ANY, entry(64, 128, 0, 4, 1))],
        "mixed float16": [(16, entry(16, 32, 0, 4, 1)), (ANY, entry(64, 32, 0, 4, 1))],
        "single": [(16, entry(16, 64, 0, 4, 1)), (ANY, entry(64, 64, 0, 4, 1))],
        "double": [(ANY, entry(32, 32, 0, 4, 1))],
    },
    "multi_linear": {
        "half": [(32, None), (ANY, entry(128, 64, 64, 8, 3))],
        "mixed": [(32, None), (ANY, entry(128, 64, 64, 8, 3))],
        # The product alone takes so long that a pass over y does not count.
        **dict.fromkeys(("mixed float16", "single", "double"), ((ANY, None),)),
    },
    "multi_lora": {"half": [(ANY, None)]},  # unless a measurement found it faster than shrink and multi_expand
    "factor_gradient": {
        "half": [(ANY, entry(32, 128, 0, 4, 3))],
        "mixed": [(ANY, entry(32, 128, 0, 8, 2))],
        "single": [(ANY, entry(32, 64, 0, 4, 2))],
        "double": [(ANY, entry(16, 32, 0, 4, 2))],
    },
    "column_sums": {kind: [(ANY, entry(32, 128, 0, 4, 1))] for kind in ("half", "single", "double")},
}
# Ranks that a program works on together; higher ranks take several. A matrix multiplication starts at 16, and beyond
# these registers spill.
RANK_BLOCKS = {"half": (16, 32), "mixed": (16,), "mixed float16": (16,), "single": (16,), "double": (16,)}
PROGRAMS = 256  # that a long sum is cut for: about two for every multiprocessor of a large GPU

DTYPES = {torch.float64: tl.float64, torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def accumulation(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which products are summed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def kind(dtype: torch.dtype, adapters: torch.dtype) -> str:
    """The key of BLOCKS[kernel] for activations and adapters of these dtypes."""
    if dtype.itemsize > 2:
        return "double" if dtype == torch.float64 else "single"
    if dtype == adapters:
        return "half"
    return "mixed float16" if dtype == torch.float16 else "mixed"


def target() -> GPUTarget | None:
    """What the kernels are compiled for: the current device. None under Triton's interpreter."""
    if triton.knobs.runtime.interpret:
        return None
    driver = triton.runtime.driver.active
    return _target_of(driver.get_current_device())


@functools.cache
def _target_of(device: int) -> GPUTarget:
    return triton.runtime.driver.active.get_current_target()


def tensor_descriptors() -> bool:
    """Whether the target copies tiles by tensor descriptors (TMA) and has the shared memory of concat_linear's tiles:
    Hopper and data-centre Blackwell."""
    chosen = target()
    return chosen is not None and chosen.backend == "cuda" and 90 <= chosen.arch < 120


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; one for the interpreter, which runs program after program."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def tuning_file(chosen: GPUTarget) -> Path:
    return TUNING / f"{f'sm_{chosen.arch}' if chosen.backend == 'cuda' else chosen.arch}.json"


@functools.cache
def measured(chosen: GPUTarget | None) -> dict:
    """What tuning/ holds for a target: kernel -> kind of its operands -> rows of (tokens at most, features at most,
    blocks), None for any number."""
    if chosen is None or not tuning_file(chosen).exists():
        return {}
    return json.loads(tuning_file(chosen).read_text())["blocks"]


def blocks(
    kernel: str, dtype: torch.dtype, tokens: int, features: int, adapters: torch.dtype, rank: int = 0
) -> dict[str, int] | None:
    """Block sizes, warps and stages of `kernel` for so many tokens and features (columns of its output; of its input in
    shrink); BLOCK_R too where a rank is given. None where another kernel is to be taken."""
    operands, table = kind(dtype, adapters), BLOCKS[kernel]
    rule = ((most, ANY, sizes) for most, sizes in table.get(operands) or table.get("mixed", ()))
    rows = (*measured(target()).get(kernel, {}).get(operands, ()), *rule)
    fitting = (sizes for most, widest, sizes in rows if tokens <= (most or ANY) and features <= (widest or ANY))
    sizes = next(fitting, None)
    if sizes is None or not rank:
        return sizes
    choice = RANK_BLOCKS[operands]
    odd = kernel == "factor_gradient" and rank % 16  # whose addresses take registers
    return sizes | {"BLOCK_R": choice[0] if rank <= choice[0] or odd else choice[-1]}


def dots(dtype: torch.dtype, adapters: torch.dtype, rounded: bool = False) -> dict:
    """How the low-rank branch multiplies: in the activations' dtype where the adapters share it, else in the dtype of
    sums, exactly. A sum that is `rounded` to 16 bits need not be exact: there NVIDIA's tensor cores take tf32, once for
    bfloat16, which has three bits less, and in three parts for float16, which has as many."""
    if dtype == adapters:
        return {"DOT": DTYPES[dtype], "PRECISION": "ieee"}
    precision = "ieee"
    if rounded and dtype.itemsize == 2 and not torch.version.hip:
        precision = "tf32" if dtype == torch.bfloat16 else "tf32x3"
    return {"DOT": DTYPES[accumulation(dtype)], "PRECISION": precision}


def split(length: int, block: int, programs: int) -> tuple[int, int]:
    """(parts, length of a part): cuts a sum over `length` so that about PROGRAMS programs run, each over at least four
    blocks. The cut depends on shapes alone, so that results do too."""
    steps = triton.cdiv(length, block)
    parts = max(1, min(triton.cdiv(PROGRAMS, max(1, programs)), steps // 4))
    part = triton.cdiv(steps, parts) * block
    return triton.cdiv(length, part), part


def partial(out: torch.Tensor, parts: int, dtype: torch.dtype) -> torch.Tensor:
    """Where a kernel puts partial sums of `out`: [parts, *out.shape], or `out` itself where there is one part."""
    return out[None] if parts == 1 else out.new_empty(parts, *out.shape, dtype=dtype)


def finish(sums: torch.Tensor, out: torch.Tensor) -> None:
    """Add partial sums up, always in the same order, and round once."""
    if len(sums) == 1:
        return
    if out.dtype == sums.dtype:
        torch.sum(sums, 0, out=out)
    else:
        out.copy_(sums.sum(0))


def launcher(function):
    """Makes the device of the first argument, a tensor or a list of them, current while kernels are launched."""

    @functools.wraps(function)
    def launch(first, *rest):
        with torch.cuda.device_of(first[0] if isinstance(first, (list, tuple)) else first):
            function(first, *rest)

    return launch
