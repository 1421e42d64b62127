"""Everything that a machine with a GPU is needed for, in at most nine minutes: `make gpu`.

Builds the libraries, runs the tests, measures the promised figures and the quick suite, in this order, with the Python
that runs it. Each part has its own limit and begins where there is time left, whatever became of those before it.
Results and logs go to $OUT (build/gpu if that is not set), a short account of each to stdout. The exit status is 0
where all parts came through.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
SECONDS = 530
KILLED = 10  # seconds that a part has to end by itself


class Part(NamedTuple):
    name: str
    seconds: int  # at most
    command: Callable[[Path, int], list[str]]  # (output folder, seconds) -> arguments of Python
    characters: int  # of the end of what it prints that are shown


def build(out: Path, seconds: int) -> list[str]:
    return ["csrc/libraries.py", "--missing"]


def look(out: Path, seconds: int) -> list[str]:
    return ["-m", "benchmarks.machine"]


def tests(out: Path, seconds: int) -> list[str]:
    return ["tests/run_in_workers.py", "tests/test_gpu.py", "--seconds", str(seconds - KILLED)]


def figures(out: Path, seconds: int) -> list[str]:
    limit = str(seconds - 3 * KILLED)  # what is begun then may take its time
    return ["-m", "benchmarks.figures", "--json", str(out / "figures.json"), "--seconds", limit]


def suite(out: Path, seconds: int) -> list[str]:
    limit = str(seconds - 3 * KILLED)
    return ["-m", "benchmarks", "--json", str(out / "suite.json"), "--seconds", limit, "--brief"]


# What they show is short enough together for who sees the last 12,000 characters alone.
PARTS = (
    Part("build", 160, build, 400),
    Part("look", 120, look, 600),  # torch may come from a cold disk
    Part("tests", 180, tests, 2600),
    Part("figures", 200, figures, 6000),
    Part("suite", 300, suite, 1400),
)
NEEDED = "look"  # without which nothing after it makes sense


def main() -> int:
    out = Path(os.environ.get("OUT") or ROOT / "build" / "gpu").absolute()
    out.mkdir(parents=True, exist_ok=True)
    until, failed = time.monotonic() + SECONDS, []
    for part in PARTS:
        limit = int(min(part.seconds, until - time.monotonic()))
        if limit < 3 * KILLED:
            print(f"== {part.name}: left out, {SECONDS} s are over", flush=True)
            failed.append(part.name)
            continue
        begin = time.monotonic()
        status = run([sys.executable, *part.command(out, limit)], out / f"{part.name}.log", limit)
        told = "done" if status == 0 else status if isinstance(status, str) else f"exit status {status}"
        print(f"== {part.name}: {told} after {time.monotonic() - begin:.0f} s", flush=True)
        print(end_of(out / f"{part.name}.log", part.characters), flush=True)
        if status != 0:
            failed.append(part.name)
            if part.name == NEEDED:
                break
    verdict = f"failed: {', '.join(failed)}" if failed else "all parts came through"
    print(f"== {verdict}; results are in {out}")
    return 1 if failed else 0


def run(command: list[str], log: Path, seconds: float) -> int | str:
    """The exit status of a command, or what became of it; its processes are ended after so many seconds."""
    environment = {
        "PYFASTPEFT_REQUIRE_NATIVE": "0",
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",
    }
    with log.open("w") as stream:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return f"ended by its limit of {seconds:.0f} s"
    finally:
        for kind, wait in ((signal.SIGTERM, KILLED / 2), (signal.SIGKILL, KILLED / 2)):
            try:
                os.killpg(process.pid, kind)
                process.wait(wait)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                pass


def end_of(log: Path, characters: int) -> str:
    """The last lines of a file, at most so many characters."""
    text = log.read_text(errors="replace").rstrip()
    return text if len(text) <= characters else text[-characters:].partition("\n")[2]


if __name__ == "__main__":
    sys.exit(main())
