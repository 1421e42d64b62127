"""Makes the table by which CUDA tensors get their backend, from results of the suite on a GPU.

    python -m benchmarks.choose RESULTS.json ... [--into pyfastpeft/ops/choices.json]

Entries of the same architecture are replaced, those of others stay. What the suite refused (a provider whose output or
gradients are off) is not in its results and so never chosen; nor is what only ran eagerly.
"""

import argparse
import json
from pathlib import Path

import torch

from benchmarks.providers import OUR_ADDMM
from benchmarks.shapes import DTYPES, IA3, Case, MultiLora, MultiLoraLinear
from pyfastpeft.ops import choice


def operands(case: Case, adapters: str) -> dict:
    """What `choice` knows a case by: {"op", "kind", "sizes"}. A training case decides the backward pass."""
    dtype = DTYPES[case.dtype]
    adapter_dtype = torch.float32 if adapters == "fp32" else dtype

    def empty(*shape, dtype=adapter_dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    M, K, N, way = case.M, case.K, case.N, "backward" if case.backward else "forward"
    first, weight = empty(M, N if case.backward else K, dtype=dtype), empty(N, K, dtype=dtype)
    if isinstance(case, IA3):
        op, ia3_l = f"ia3_{way}", empty(K if case.feedforward else N)
        second = first if case.backward else weight
        args = (first, second, weight if case.backward else None, ia3_l, case.feedforward)
    elif isinstance(case, MultiLora):
        op, adapters = f"multi_lora_{way}", len(case.ranks)
        factors = empty(adapters, max(case.ranks), K), empty(adapters, N, max(case.ranks))
        weight = weight if isinstance(case, MultiLoraLinear) else None
        args = (first, None, weight, *factors) if case.backward else (first, weight, None, *factors)
    else:
        op, factors = f"lora_{way}", (empty(case.rank, K), empty(N, case.rank))
        seed = empty(1) if case.dropout else None
        middle = (None, weight) if case.backward else (weight, None)
        args = (first, *middle, *factors, 1.0, case.dropout, seed)
    kind, sizes = choice.described(op, args)
    return {"op": op, "kind": kind, "sizes": list(sizes)}


def entries(results: dict) -> list[dict]:
    """The backends of every op, kind and sizes in these results, the fastest first."""
    found = {}
    for benchmark in results["benchmarks"]:
        entry = benchmark["extra_info"]
        if "operands" in entry and entry["mode"] == "graph":
            key = json.dumps(entry["operands"])
            name = entry["provider"].rpartition("-")[0]
            found.setdefault(key, {})["addmm" if name == OUR_ADDMM else name] = entry["seconds"]["median"]
    return [json.loads(key) | {"backends": sorted(times, key=times.get)} for key, times in found.items()]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.choose", description="Make the table of choices.")
    parser.add_argument("results", nargs="+", type=Path, help="what python -m benchmarks wrote on a GPU")
    parser.add_argument("--into", type=Path, default=choice.FILE, help="the table to write (default: %(default)s)")
    options = parser.parse_args(arguments)
    table = json.loads(options.into.read_text()) if options.into.exists() else {}
    made: dict[str, list[dict]] = {}
    for path in options.results:
        results = json.loads(path.read_text())
        if not (architecture := results["machine_info"].get("architecture")):
            parser.error(f"{path} does not come from a GPU")
        made.setdefault(architecture, []).extend(entries(results))
    for architecture, rows in made.items():
        if not rows:
            parser.error(f"the results of {architecture} hold no entry of ours that was timed as a graph")
    lines = [
        f'  "{architecture}": [\n' + ",\n".join(f"    {json.dumps(row)}" for row in rows) + "\n  ]"
        for architecture, rows in sorted((table | made).items())
    ]
    options.into.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
