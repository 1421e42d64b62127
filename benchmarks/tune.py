"""Measures block sizes on the GPU at hand and writes kernels/tuning/ARCHITECTURE.json, which the launchers take before
the rule of kernels/blocks.py.

    python -m benchmarks.tune [--kernels linear shrink] [--dtype bf16] [--adapters 16bit] [--out FILE]

A candidate runs as one captured CUDA graph over so many problems that none finds its tensors in the L2 cache; the
graphs of a case are replayed in interleaved rounds, and the lowest median wins. Candidates that do not compile, spill
registers or give wrong results are left out. An existing file keeps what is not measured anew.
"""

import argparse
import json
import math
import re
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path

import torch

from benchmarks import machine, measure
from benchmarks.providers import Provider, build_ours, problem
from benchmarks.shapes import DTYPES, IA3, Case, Lora, MultiLora, MultiLoraLinear, decode
from pyfastpeft.kernels import blocks, ia3, lora, multi_lora

TOKENS, SIDES = (16, 64, 512, 2048, 8192), (1024, 4096, 14336)
ADAPTERS = 8  # that share the tokens of multi_lora's kernels
# kernel -> (tokens, features, depth) of its blocks
CANDIDATES = {
    "linear": [(16, 32, 128), (16, 64, 128), (32, 64, 128), (64, 64, 64), (64, 128, 64), (128, 128, 64)],
    "concat_linear": [(256, 128, 64), (128, 128, 64), (128, 256, 64)],
    "ia3_linear": [(16, 32, 128), (16, 64, 128), (64, 64, 64), (128, 64, 64), (128, 128, 32), (128, 128, 64)],
    "shrink": [(16, 0, 64), (16, 0, 128), (32, 0, 128), (64, 0, 64), (64, 0, 128), (128, 0, 64)],
    "factor_gradient": [(32, 64, 0), (32, 128, 0), (64, 64, 0), (64, 128, 0)],
    "multi_expand": [(16, 32, 0), (16, 64, 0), (16, 128, 0), (64, 64, 0), (64, 128, 0)],
    "multi_lora": [(16, 32, 128), (16, 64, 128), (16, 128, 128)],
    "multi_linear": [(64, 64, 64), (64, 128, 64), (128, 64, 64), (128, 128, 64)],
}
KERNELS = {
    "linear": lora.linear_kernel,
    "concat_linear": lora.concat_linear_kernel,
    "ia3_linear": ia3.ia3_linear_kernel,
    "shrink": lora.shrink_kernel,
    "factor_gradient": lora.factor_gradient_kernel,
    "multi_expand": multi_lora.multi_expand_kernel,
    "multi_lora": multi_lora.multi_lora_kernel,
    "multi_linear": multi_lora.multi_linear_kernel,
}
RIVALS = "concat_linear", "multi_lora", "multi_linear"  # which do what others do


def case_of(kernel: str, tokens: int, side: int, dtype: str, mode: str = "graph") -> Case:
    """A case in which the kernel takes part; `tokens` are those of one adapter."""
    shape = dict(K=side, N=side, dtype=dtype, mode=mode)
    if kernel == "ia3_linear":
        return IA3(M=tokens, feedforward=True, **shape)
    if kernel.startswith("multi_"):
        kind = MultiLoraLinear if kernel == "multi_linear" else MultiLora
        return decode(tokens * ADAPTERS, side, side, ADAPTERS, kind=kind, dtype=dtype, mode=mode)
    return Lora(M=tokens, backward=kernel == "factor_gradient", **shape)


def candidates(kernel: str, rule: dict | None, tokens: int) -> list[dict | None]:
    """Blocks to try: the rule's own first, and None where the kernel may be done without."""
    found = [rule, None] if kernel in RIVALS else [rule]
    for (block_m, block_n, block_k), stages in product(CANDIDATES[kernel], (2, 3, 4) if "linear" in kernel else (3, 4)):
        warps = 8 if block_m * max(block_n, 16) >= 128 * 128 else 4
        if block_m <= max(16, 2 * tokens):
            found.append(blocks.entry(block_m, block_n, block_k, warps, stages))
    return [entry for i, entry in enumerate(found) if entry not in found[:i]]


@contextmanager
def chosen(table: dict) -> Iterator[None]:
    """The launchers take `table`, as it is at each launch, for what tuning/ holds."""
    before, blocks.measured = blocks.measured, lambda target: table
    try:
        yield
    finally:
        blocks.measured = before


def median_seconds(
    case: Case, adapters: str, kernel: str, entries: list[dict | None], use: Callable[[dict | None], None],
    device: str = "cuda", effort: measure.Effort = measure.EFFORT["quick"],
) -> list[float]:  # fmt: skip
    """Of every entry; infinity for one that is left out. `use` makes the launchers take an entry."""
    problems = [problem(case, device, seed) for seed in range(measure.sets(case, device))]
    runs, kept = {}, []
    with torch.set_grad_enabled(case.backward):
        for number, entry in enumerate(entries):
            use(entry)
            provider = Provider(str(number), build_ours, adapters, "triton")
            try:
                with measure.forced(provider):
                    calls = [provider(each) for each in problems]
                    measure.check(problems[0], provider, calls[0])
                    steps = [measure.step(each, call) for each, call in zip(problems, calls)]
                    run = measure.runner(steps, case.mode)
            except Exception as error:  # too much shared memory, a wrong result: the next one may do
                print(f"  {entry}: {type(error).__name__}: {error}", file=sys.stderr)
                if not measure.usable(device):
                    raise
                continue
            if entry and spills(kernel, entry):
                continue
            runs[provider] = run
            kept.append(number)
        seconds = measure.interleave(runs, effort, device)
    medians = [math.inf] * len(entries)
    for number, rounds in zip(kept, seconds.values()):
        medians[number] = statistics.median(rounds)
    return medians


def spills(kernel: str, entry: dict) -> bool:
    """Whether registers spill in what triton has compiled of the kernel with these blocks."""
    function = KERNELS[kernel]
    for cache, *_ in getattr(function, "device_caches", {}).values():
        for compiled in cache.values():
            named = {function.arg_names[path[0]]: value for path, value in compiled.src.constants.items()}
            named |= {name: getattr(compiled.metadata, name) for name in ("num_warps", "num_stages")}
            if compiled.n_spills and entry.items() <= named.items():
                return True
    return False


def tune(kernel: str, dtype: str, adapters: str, seconds: Callable = median_seconds) -> dict:
    """{kernel: {kind: rows}} for blocks.measured: the best of its candidates at every size; {} where it is not for such
    operands. Other kernels take what is measured of them already."""
    activations, parameters = DTYPES[dtype], DTYPES[dtype] if adapters == "16bit" else torch.float32
    operands = blocks.kind(activations, parameters)
    if not {operands, "mixed"} & {*blocks.BLOCKS[kernel]}:
        return {}
    table = blocks.measured(blocks.target()) | {rival: {operands: [(None, None, None)]} for rival in RIVALS}
    table.pop(kernel, None)
    found = {}

    def use(entry):
        table[kernel] = {operands: [(None, None, entry)]}

    with chosen(table):
        for tokens, side in product(TOKENS, SIDES):
            entries = candidates(kernel, blocks.blocks(kernel, activations, tokens, side, parameters), tokens)
            medians = seconds(case_of(kernel, tokens, side, dtype), adapters, kernel, entries, use)
            del table[kernel]
            best = min(range(len(entries)), key=medians.__getitem__)
            if medians[best] < math.inf:
                found[tokens, side] = entries[best]
                print(f"{kernel} {operands}, {tokens} tokens, {side}: {entries[best]} {1e3 * medians[best]:.3g} ms")
    return {kernel: {operands: [[*_most(*sizes), entry] for sizes, entry in found.items()]}}


def _most(tokens: int, side: int) -> tuple[int | None, int | None]:
    """How far a choice made at these sizes reaches: up to them, and without end from the largest."""
    return None if tokens == TOKENS[-1] else tokens, None if side == SIDES[-1] else side


def write(path: Path, table: dict, origin: dict) -> None:
    """The file, with what it held of other kernels and operands."""
    kept = json.loads(path.read_text())["blocks"] if path.exists() else {}
    merged = {kernel: kept.get(kernel, {}) | table.get(kernel, {}) for kernel in sorted({*kept, *table})}
    text = json.dumps({"origin": origin, "blocks": merged}, indent=1)
    path.parent.mkdir(exist_ok=True)
    row = re.compile(r"\n {4}\[.*?\n {4}\]", re.DOTALL)
    path.write_text(row.sub(lambda found: "\n    " + " ".join(found[0].split()), text) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description="Measure block sizes on this GPU.")
    parser.add_argument("--kernels", nargs="+", choices=CANDIDATES, default=list(CANDIDATES))
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--adapters", choices=("16bit", "fp32"), default="16bit")
    parser.add_argument("--out", type=Path, help="default: the file that the launchers read on this GPU")
    options = parser.parse_args()
    if machine.device() != "cuda":
        raise SystemExit("torch sees no GPU here: block sizes are measured on the GPU that is to use them")
    found = machine.describe()
    origin = {name: found[name] for name in ("gpu", "driver", "versions", "commit")}
    for kernel in options.kernels:
        table = tune(kernel, options.dtype, "fp32" if options.dtype == "fp32" else options.adapters)
        write(options.out or blocks.tuning_file(blocks.target()), table, origin)
        blocks.measured.cache_clear()


if __name__ == "__main__":
    main()
