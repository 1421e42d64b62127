"""Measures the figures that this project promises, of the GPU where there is one, each against its limit.

    python -m benchmarks.figures [--isa avx2] [--json FILE]

Every figure comes from one interleaved run; it is met where its median is. The file is written anew after each.
"""

import argparse
import json
import os
import sys
from pathlib import Path

from benchmarks import machine, report
from benchmarks.figures import cpu, cuda


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.figures", description=__doc__.split("\n")[0])
    parser.add_argument("--isa", choices=machine.ISA_CAPS, help="the CPU's, as one with this instruction set")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--tiny", action="store_true", help="small shapes and three rounds: tries the code only")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="of a GPU's: begin none after this time")
    options = parser.parse_args()
    machine.cap_isa(options.isa)
    on_cpu = options.isa is not None or machine.device() == "cpu"
    found = {"machine_info": machine.describe(), "figures": []}
    if on_cpu:
        figures = cpu.measured(options.tiny)
    else:
        found["benchmarks"] = []
        figures = cuda.measured(options.tiny, options.seconds, found["benchmarks"])
    for figure in figures:
        found["figures"].append(figure.as_dict())
        print(report.figure_row(found["figures"][-1]), flush=True)
        if options.json:
            write(options.json, found)
    print("\n" + report.figures_table(found))
    return 1 if any(figure["met"] is False and "median" not in figure for figure in found["figures"]) else 0


def write(path: Path, found: dict) -> None:
    """The file whole or, where this is interrupted, what it held before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(path.name + ".new")
    new.write_text(json.dumps(found, indent=1) + "\n")
    os.replace(new, path)


if __name__ == "__main__":
    sys.exit(main())
