"""Runs the suite and reports: python -m benchmarks [--full] [--isa avx2] [--json FILE] [-- pytest's arguments]."""

import argparse
import signal
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from benchmarks import machine, report, shapes

ROOT = Path(__file__).parent.parent


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Time the ops against their peers.")
    parser.add_argument("--size", choices=shapes.SIZES, default="quick", help="shapes and effort (default: quick)")
    parser.add_argument("--full", action="store_const", const="full", dest="size", help="all shapes: --size full")
    parser.add_argument("--isa", choices=machine.ISA_CAPS, help="run as a CPU with this instruction set")
    parser.add_argument("--seconds", type=float, help="begin no case after this time")
    parser.add_argument("--brief", action="store_true", help="print no tables and draw no plot")
    parser.add_argument("--json", type=Path, help="where the results go (default: build/benchmarks/<device>.json)")
    parser.add_argument("pytest", nargs="*", help="further arguments of pytest, after --")
    options = parser.parse_args()
    machine.cap_isa(options.isa)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what was measured is written all the same
    name = "-".join(filter(None, (machine.device(), options.isa)))
    path = (options.json or ROOT / "build" / "benchmarks" / f"{name}.json").absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    code = pytest.main(
        [
            str(Path(__file__).with_name("bench_ops.py")),
            f"--rootdir={ROOT}",
            f"--size={options.size}",
            f"--benchmark-json={path}",
            *([f"--seconds={options.seconds}"] if options.seconds else []),
            "--benchmark-quiet",
            "--disable-warnings",
            "-p",
            "no:cacheprovider",
            *options.pytest,
        ]
    )
    if code in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) and path.exists() and not options.brief:
        plot = ["--plot", str(path.with_suffix(".png"))] if find_spec("matplotlib") else []
        report.main([str(path), *plot])
    return code


if __name__ == "__main__":
    sys.exit(main())
