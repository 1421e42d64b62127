"""pytest-benchmark's part: one entry for every case and provider, in one JSON file.

All providers of a case are timed together, in interleaved rounds, when the first of them is asked for. An entry then
plays its recorded rounds back to pytest-benchmark through a clock of its own.
"""

import time
from functools import cache, lru_cache

import pytest

from benchmarks import choose, machine, providers, shapes
from benchmarks.measure import EFFORT, Measurer, Result, short

BEGIN = time.monotonic()
KEPT_STATS = ("min", "max", "mean", "stddev", "median", "iqr", "outliers", "ops", "rounds", "iterations")


def pytest_addoption(parser):
    parser.addoption("--size", choices=shapes.SIZES, default="quick", help="shapes and effort of the benchmarks")
    parser.addoption("--seconds", type=float, default=float("inf"), help="begin no case after this time")


def pytest_generate_tests(metafunc):
    if "provider" in metafunc.fixturenames:
        device = machine.device()
        size = metafunc.config.getoption("size")
        entries = [
            pytest.param(
                case,
                provider,
                id=f"{case.name} {provider.name}".replace(" ", "-"),
                marks=pytest.mark.benchmark(group=case.name, timer=replayed),
            )
            for case in shapes.all_cases(size, device)
            for provider in providers.providers(case, device)
        ]
        metafunc.parametrize(("case", "provider"), entries)


@cache
def measurer() -> Measurer:
    return Measurer(machine.device(), patience=90.0)


@lru_cache(maxsize=1)  # the entries of a case follow each other
def results(case: shapes.Case, size: str, until: float) -> dict[str, Result]:
    contenders = providers.providers(case, machine.device())
    if time.monotonic() > until:
        return {each.name: Result(case, each, f"{each.name} on {case.name}: time was up") for each in contenders}
    return measurer()(case, EFFORT[size], contenders)


class Replay:
    """A clock that stands still but for `step`, which moves it by the next recorded duration."""

    now = 0.0

    def __init__(self, seconds: list[float]):
        self.seconds = iter(seconds)

    def step(self) -> None:
        Replay.now += next(self.seconds)


def replayed() -> float:
    return Replay.now


@pytest.fixture
def record(benchmark, request, case, provider):
    """Fills this entry; fails, with the figures, where the provider was refused."""

    def fill() -> None:
        options = request.config.option
        measured = results(case, options.size, BEGIN + options.seconds)
        result = measured[provider.name]
        base = measured["base"]
        if refused := result.refused or base.refused:
            benchmark.skipped = True
            pytest.fail(refused, pytrace=False)
        benchmark.extra_info.update(result.summary(base), mode=case.mode)
        if provider.backend:
            benchmark.extra_info["operands"] = choose.operands(case, provider.adapters)
        benchmark.pedantic(Replay(result.seconds).step, rounds=len(result.seconds))

    return fill


def pytest_benchmark_generate_machine_info():
    return machine.describe()


def pytest_benchmark_generate_commit_info():
    return {}


def pytest_benchmark_update_json(output_json):
    """Results are committed: keeps what the report and `pytest-benchmark compare` read, to four digits."""
    for entry in output_json["benchmarks"]:
        entry["stats"] = short({key: entry["stats"][key] for key in KEPT_STATS})
        entry["extra_info"] = short(entry["extra_info"])
        del entry["params"], entry["param"], entry["options"]
