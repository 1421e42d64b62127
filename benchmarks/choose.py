"""Makes the table by which CUDA tensors get their backend, from results of the suite on a GPU.

    python -m benchmarks.choose RESULTS.json ... [--into pyfastpeft/ops/choices.json]

Entries of the same architecture are replaced, those of others stay. What the suite refused (a provider whose output or
gradients are off) is not in its results and so never chosen; nor is what only ran eagerly.
"""

import argparse
import json
from functools import cache
from itertools import product
from pathlib import Path
from unittest import mock

import torch

from benchmarks.measure import step
from benchmarks.providers import OUR_ADDMM, build_ours, problem
from benchmarks.shapes import Case
from pyfastpeft.ops import choice, dispatch, use_backend


@cache
def operands(case: Case, adapters: str) -> list[dict]:
    """What `choice` knows the raw ops of a case by, in the order in which they run: {"op", "kind", "sizes"} of each."""
    found = []

    def run(op, *args, **options):
        kind, sizes = choice.described(op, args)
        found.append({"op": op, "kind": kind, "sizes": list(sizes)})

    given = problem(case, "meta")
    call = build_ours(given, adapters)
    # A backend is forced as where it is measured: then the ops draw dropout's mask themselves.
    with mock.patch.object(dispatch, "run", run), use_backend("reference"), torch.set_grad_enabled(case.backward):
        step(given, call)()
    return found


def entries(*results: dict) -> list[dict]:
    """The backends of every op, kind and sizes in these results, the fastest first. All ops of a case were timed under
    one backend, and it decides them all. Where several cases have the same op, kind and sizes, the first one decides,
    those of a forward pass before those of both passes."""
    found: dict[str, dict[tuple, dict[str, float]]] = {}
    for trains, number in product((False, True), range(len(results))):
        for benchmark in results[number]["benchmarks"]:
            entry = benchmark["extra_info"]
            ran = entry.get("operands", []) if entry["mode"] == "graph" else []
            if trains != any(each["op"].endswith("backward") for each in ran):
                continue
            name, _, adapters = entry["provider"].rpartition("-")
            case = number, benchmark["group"], adapters
            for each in ran:
                times = found.setdefault(json.dumps(each), {}).setdefault(case, {})
                times["addmm" if name == OUR_ADDMM else name] = entry["seconds"]["median"]
    firsts = {key: next(iter(cases.values())) for key, cases in found.items()}
    return [json.loads(key) | {"backends": sorted(times, key=times.get)} for key, times in firsts.items()]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.choose", description="Make the table of choices.")
    parser.add_argument("results", nargs="+", type=Path, help="what python -m benchmarks wrote on a GPU")
    parser.add_argument("--into", type=Path, default=choice.FILE, help="the table to write (default: %(default)s)")
    options = parser.parse_args(arguments)
    table = json.loads(options.into.read_text()) if options.into.exists() else {}
    measured: dict[str, list[dict]] = {}
    for path in options.results:
        results = json.loads(path.read_text())
        if not (architecture := results["machine_info"].get("architecture")):
            parser.error(f"{path} does not come from a GPU")
        measured.setdefault(architecture, []).append(results)
    made = {architecture: entries(*results) for architecture, results in measured.items()}
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
