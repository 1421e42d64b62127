"""Runs tests in processes of their own: one that hangs, kills its process or breaks CUDA in it fails alone, and the
rest goes on in a new one.

    python tests/run_in_workers.py tests/test_gpu.py [--processes N] [--seconds S] [--patience S]

Prints every failure in full, then why tests were skipped and what took long, and last what fits a screen: a line for
each kind of failure, and the counts.
"""

import argparse
import collections
import os
import sys
import threading
import time
from pathlib import Path

import pytest
from _pytest.runner import runtestprotocol

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.worker import Worker, WorkerLost, described, serve  # noqa: E402

HUNG = 2  # tests of a kind after which the others of it are not run


class Loop:
    """The pytest plugin of a process that runs what it is asked to: None asks for the names of all tests."""

    def __init__(self, connection):
        self.connection = connection

    def pytest_runtestloop(self, session):
        if session.testsfailed:
            raise session.Interrupted("errors while tests were collected")
        items = {item.nodeid: item for item in session.items}
        serve(self.connection, lambda name, tell: list(items) if name is None else run(items[name]))
        return True


def run(item) -> dict:
    """Its outcome, seconds, and what failed: in one line, and in full. Raises where CUDA is broken afterwards."""
    begin = time.monotonic()
    reports = runtestprotocol(item, log=False, nextitem=None)
    failed = [report for report in reports if report.failed]
    skipped = any(report.skipped for report in reports)
    found = {"outcome": "failed" if failed else "skipped" if skipped else "passed", "why": "", "text": ""}
    if failed:
        crash = getattr(failed[0].longrepr, "reprcrash", None)
        found["why"] = (crash.message if crash else str(failed[0].longrepr)).partition("\n")[0]
        found["text"] = "\n".join(report.longreprtext for report in failed)
    elif skipped:
        found["why"] = str(next(report.longrepr for report in reports if report.skipped)[2])
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except Exception as error:
            print(f"--- {item.nodeid}\n{found['text']}", file=sys.stderr, flush=True)
            raise RuntimeError(f"{found['why'] or 'it passed'}; after it {described(error)}") from None
    return found | {"seconds": time.monotonic() - begin}


def work(connection, arguments: list[str]) -> None:
    """A process: collects the tests and runs those that it is asked to."""
    os.chdir(ROOT)
    # Nothing is captured: what a process says that dies is all that tells why.
    options = ["-p", "no:cacheprovider", "--no-header", "-q", "--capture=no"]
    code = pytest.main([*arguments, *options], plugins=[Loop(connection)])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        connection.send(("lost", f"pytest ended with {pytest.ExitCode(code).name}: its log tells why"))


class Run:
    """All tests, dealt to processes as they become free."""

    def __init__(self, arguments: list[str], processes: int, seconds: float, patience: float):
        self.arguments, self.processes, self.patience = arguments, processes, patience
        self.until = time.monotonic() + seconds
        self.lock = threading.Lock()
        self.hung = collections.Counter()
        self.found: dict[str, dict] = {}

    def all(self) -> dict[str, dict]:
        """name -> outcome. Raises WorkerLost where tests cannot be collected."""
        first = Worker(work, self.arguments)
        names = first.ask(None, self.patience)
        self.left = collections.deque(names)
        others = [Worker(work, self.arguments) for _ in range(min(self.processes, len(names)) - 1)]
        threads = [threading.Thread(target=self.go_on, args=(each,)) for each in (first, *others)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for name in self.left:
            self.found[name] = not_run("time was up")
        return {name: self.found[name] for name in names}

    def go_on(self, worker: Worker) -> None:
        while name := self.next():
            # A kind is a test function on one backend, its first parameter.
            kind, remaining = name.rpartition("::")[2].partition("-")[0], self.until - time.monotonic()
            if self.hung[kind] >= HUNG:
                self.found[name] = not_run(f"{HUNG} of its kind hung")
                continue
            begin = time.monotonic()
            try:
                self.found[name] = worker.ask(name, min(self.patience, max(remaining, 1)))
            except WorkerLost as lost:
                if time.monotonic() >= self.until:
                    self.found[name] = not_run("time was up")
                    continue
                seconds = time.monotonic() - begin
                self.hung[kind] += seconds >= self.patience
                self.found[name] = {"outcome": "failed", "why": str(lost), "text": str(lost), "seconds": seconds}
        worker.close()

    def next(self) -> str | None:
        with self.lock:
            return self.left.popleft() if self.left and time.monotonic() < self.until else None


def not_run(why: str) -> dict:
    return {"outcome": "not run", "why": why, "text": why, "seconds": 0.0}


def summary(found: dict[str, dict], lines: int = 14, width: int = 170) -> str:
    """The counts, and the failures by what they say, the most frequent first."""
    alike = collections.defaultdict(list)
    for name, each in found.items():
        if each["outcome"] in ("failed", "not run"):
            alike[each["why"][:60]].append(name)
    told = []
    for names in sorted(alike.values(), key=len, reverse=True):
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        told.append(f"FAILED {names[0].rpartition('::')[2]}{more}: {found[names[0]]['why']}"[:width])
    if len(told) > lines:
        told[lines:] = [f"... and {len(told) - lines} other kinds of failure"]
    counts = collections.Counter(each["outcome"] for each in found.values())
    kinds = ("failed", "not run", "passed", "skipped")
    return "\n".join([*told, ", ".join(f"{counts[kind]} {kind}" for kind in kinds if counts[kind])])


def full(found: dict[str, dict]) -> str:
    """Every failure, why tests were skipped, and what took longest."""
    failures = [f"--- {n}\n{e['text']}\n" for n, e in found.items() if e["outcome"] in ("failed", "not run")]
    skips = collections.Counter(each["why"] for each in found.values() if each["outcome"] == "skipped")
    slow = sorted(found, key=lambda name: -found[name]["seconds"])[:20]
    return "\n".join(
        [
            *failures,
            *(f"skipped {count}: {why}" for why, count in skips.most_common()),
            *(f"{found[name]['seconds']:.1f} s {name}" for name in slow),
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--processes", type=int, default=max(1, min(12, (os.cpu_count() or 1) * 3 // 4)))
    parser.add_argument("--seconds", type=float, default=float("inf"), help="for all tests together")
    parser.add_argument("--patience", type=float, default=90.0, help="seconds for one test, compilation included")
    options, arguments = parser.parse_known_args()
    begin = time.monotonic()
    try:
        found = Run(arguments, options.processes, options.seconds, options.patience).all()
    except WorkerLost as lost:
        print(f"no tests were run: {lost}")
        return 1
    print(full(found))
    print(f"{summary(found) or 'no tests were found'} in {time.monotonic() - begin:.1f} s")
    return 0 if found and not {"failed", "not run"} & {each["outcome"] for each in found.values()} else 1


if __name__ == "__main__":
    sys.exit(main())
